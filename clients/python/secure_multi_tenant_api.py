"""The predecessor's client object over gaoler's HTTP API, standard library only.

    from secure_multi_tenant_api import SecurityLevel, SecureMultiTenantAPI

    api = SecureMultiTenantAPI("http://127.0.0.1:8080", security_level=SecurityLevel.BALANCED)
    answer = api.create_message(oauth_token="sk-ant-oat01-...", messages=[{"role": "user", "content": "Hello"}])
    print(answer["content"][0]["text"])

What was a folder of the machine is a name inside the tenant's cage: no client can read another tenant's workspace by
its path, nor its own without asking the server. It must never write a token anywhere.
"""

import enum
import json
import urllib.error
import urllib.request


class SecurityLevel(enum.Enum):
    PARANOID = "PARANOID"
    BALANCED = "BALANCED"
    DEVELOPER = "DEVELOPER"


class APIError(Exception):
    """An answer that is no message: its status, its stable code, and the server's words."""

    def __init__(self, status, code, message):
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code


class SecureMultiTenantAPI:
    def __init__(self, base_url="http://127.0.0.1:8080", workspaces_root="/workspace",
                 security_level=SecurityLevel.BALANCED, timeout=600):
        self.base_url = base_url.rstrip("/")
        self.workspaces_root = workspaces_root
        self.security_level = security_level
        self.timeout = timeout

    def create_message(self, oauth_token, messages, session_id=None, model="sonnet", mcp_servers=None,
                       skip_mcp_permissions=None, **more):
        body = {"messages": messages, "model": model, "session_id": session_id, "mcp_servers": mcp_servers,
                "skip_mcp_permissions": skip_mcp_permissions, "security_level": self.security_level.value, **more}
        body = {name: value for name, value in body.items() if value is not None}
        request = urllib.request.Request(
            f"{self.base_url}/v1/messages", data=json.dumps(body).encode(), method="POST",
            headers={"authorization": f"Bearer {oauth_token}", "content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as refused:
            error = json.load(refused)["error"]
            raise APIError(refused.code, error["details"]["error_code"], error["message"]) from None

    def get_workspace_path(self, oauth_token):
        """Where the tenant's workspace is for its agent: the same name in every cage, and another folder behind it."""
        return self.workspaces_root
