// A remote MCP server for the suite mcp: streamable HTTP at /mcp and SSE at /sse, built with the official SDK. It answers
// nobody who does not show its token, prints its port, and must never be reached by anything but a test.
import http from "node:http";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { SSEServerTransport } from "@modelcontextprotocol/sdk/server/sse.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";

const token = process.argv[2];
const sessions = new Map();

function server() {
    const server = new McpServer({ name: "remote", version: "7.0.0" });
    server.registerTool("whoami", { description: "Names the headers that came." }, async (extra) => ({
        content: [{ type: "text", text: `headers: ${Object.keys(extra.requestInfo?.headers ?? {}).sort()}` }],
    }));
    return server;
}

const listener = http.createServer(async (request, response) => {
    const url = new URL(request.url, "http://here");
    if (request.headers.authorization !== `Bearer ${token}`) {
        response.writeHead(401).end();
        return;
    }
    if (url.pathname === "/sse") {
        const transport = new SSEServerTransport("/messages", response);
        sessions.set(transport.sessionId, transport);
        await server().connect(transport);
    } else if (url.pathname === "/messages") {
        await sessions.get(url.searchParams.get("sessionId")).handlePostMessage(request, response);
    } else {
        const transport = new StreamableHTTPServerTransport({ sessionIdGenerator: undefined });
        await server().connect(transport);
        await transport.handleRequest(request, response);
    }
});
listener.listen(0, "127.0.0.1", () => console.log(listener.address().port));
process.stdin.on("end", () => process.exit(0)).resume();
