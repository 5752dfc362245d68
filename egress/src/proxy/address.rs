//! Whether an address is of the public internet.
//! It must never take an address that leads into a private network, to a metadata service or back to this machine,
//! in whatever form of IPv6 it is wrapped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// IPv4 that is not public: network, length of its prefix. IANA's registry of special addresses, multicast, and one
/// address that a cloud put its machines' agent at.
const NOT_PUBLIC_V4: [(Ipv4Addr, u32); 17] = [
    // This network (RFC 791), where 0.0.0.0 is this machine.
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    // Private (RFC 1918).
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    // Behind carriers' translators (RFC 6598); a cloud's metadata is at 100.100.100.200.
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    // Loopback.
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Link-local; most clouds' metadata is at 169.254.169.254.
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    // Protocols of the IETF; a cloud's metadata is at 192.0.0.192.
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    // Documentation.
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    // Relays of 6to4 (RFC 7526 took it back).
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    // Relays of multicast (RFC 7450).
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    // Benchmarks (RFC 2544).
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    // Multicast.
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    // Reserved, and the broadcast address.
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    // The agent of one cloud, for which it uses an address that it owns.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
];

/// The only part of IPv6 that is global unicast today. Outside lie loopback, the unspecified address, v4-mapped and
/// v4-compatible ones, NAT64, unique local, link-local, site-local and multicast addresses.
const GLOBAL_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// What is not public within it.
const NOT_PUBLIC_V6: [(Ipv6Addr, u32); 4] = [
    // Protocols of the IETF: Teredo, benchmarks, ORCHID, relays of multicast.
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    // Documentation.
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
    // 6to4, which holds an IPv4 address.
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
];

/// Whether a cage may be connected to this address.
pub fn is_allowed(address: IpAddr) -> bool {
    is_public(address) && !is_own(address)
}

/// Whether no table knows it as anything but public.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_PUBLIC_V4.iter().any(|net| is_in_v4(address, *net)),
        IpAddr::V6(address) => {
            is_in_v6(address, GLOBAL_V6) && !NOT_PUBLIC_V6.iter().any(|net| is_in_v6(address, *net))
        }
    }
}

fn is_in_v4(address: Ipv4Addr, (net, length): (Ipv4Addr, u32)) -> bool {
    (address.to_bits() ^ net.to_bits()).leading_zeros() >= length
}

fn is_in_v6(address: Ipv6Addr, (net, length): (Ipv6Addr, u32)) -> bool {
    (address.to_bits() ^ net.to_bits()).leading_zeros() >= length
}

/// Whether it is an address of this machine, public as it may be: who knocks there from here comes from inside. The
/// kernel reaches its own addresses from those themselves, which connect(2) of a datagram socket tells without a
/// packet. What cannot be routed is no address of this machine.
fn is_own(address: IpAddr) -> bool {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = || {
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        // Any port will do; nothing is sent.
        socket.connect(SocketAddr::new(address, 9))?;
        socket.local_addr()
    };
    source().is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: bool) {
        assert_eq!(is_public(text.parse().unwrap()), expected, "{text}");
    }

    #[test]
    fn no_address_of_ipv4_that_is_not_public_is_taken() {
        // The first and the last of each, and their neighbours, which are public.
        for (before, first, last, after) in [
            ("", "0.0.0.0", "0.255.255.255", "1.0.0.0"),
            ("9.255.255.255", "10.0.0.0", "10.255.255.255", "11.0.0.0"),
            ("100.63.255.255", "100.64.0.0", "100.127.255.255", "100.128.0.0"),
            ("126.255.255.255", "127.0.0.0", "127.255.255.255", "128.0.0.0"),
            ("169.253.255.255", "169.254.0.0", "169.254.255.255", "169.255.0.0"),
            ("172.15.255.255", "172.16.0.0", "172.31.255.255", "172.32.0.0"),
            ("191.255.255.255", "192.0.0.0", "192.0.0.255", "192.0.1.0"),
            ("192.0.1.255", "192.0.2.0", "192.0.2.255", "192.0.3.0"),
            ("192.52.192.255", "192.52.193.0", "192.52.193.255", "192.52.194.0"),
            ("192.88.98.255", "192.88.99.0", "192.88.99.255", "192.88.100.0"),
            ("192.167.255.255", "192.168.0.0", "192.168.255.255", "192.169.0.0"),
            ("198.17.255.255", "198.18.0.0", "198.19.255.255", "198.20.0.0"),
            ("198.51.99.255", "198.51.100.0", "198.51.100.255", "198.51.101.0"),
            ("203.0.112.255", "203.0.113.0", "203.0.113.255", "203.0.114.0"),
            ("168.63.129.15", "168.63.129.16", "168.63.129.16", "168.63.129.17"),
            ("223.255.255.255", "224.0.0.0", "239.255.255.255", ""),
            ("", "240.0.0.0", "255.255.255.255", ""),
        ] {
            [first, last].into_iter().for_each(|text| check(text, false));
            [before, after].into_iter().filter(|text| !text.is_empty()).for_each(|text| check(text, true));
        }
        // Every row of the table is one of those above.
        assert_eq!(NOT_PUBLIC_V4.len(), 17);
        for metadata in
            ["169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "168.63.129.16"]
        {
            check(metadata, false);
        }
        for public in ["1.1.1.1", "8.8.8.8", "140.82.121.4", "151.101.0.223"] {
            check(public, true);
        }
    }

    #[test]
    fn no_address_of_ipv6_that_is_not_public_is_taken() {
        for text in [
            "::",
            "::1",
            // v4-mapped, v4-compatible, v4-translated, NAT64: whatever they hold.
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b::8.8.8.8",
            "64:ff9b:1::10.0.0.1",
            "64:ff9b:1:ffff:ffff:ffff:ffff:ffff",
            // Discard-only, 6bone's, SRv6.
            "100::1",
            "100:0:0:1::1",
            "5f00::1",
            // Protocols of the IETF: Teredo, benchmarks, AMT, AS112, ORCHID.
            "2001::1",
            "2001:0:7f00:1::",
            "2001:2::1",
            "2001:3::1",
            "2001:10::1",
            "2001:20::1",
            "2001:1ff:ffff:ffff:ffff:ffff:ffff:ffff",
            "2001:db8::1",
            "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff",
            "3fff::1",
            "3fff:fff:ffff:ffff:ffff:ffff:ffff:ffff",
            "2002::1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::1",
            "2002:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            // Not yet given out.
            "1fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "4000::1",
            "8000::1",
            // Unique local (metadata of two clouds), link-local, site-local, multicast.
            "fc00::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "feff::1",
            "ff02::1",
            "ff0e::1",
        ] {
            check(text, false);
        }
        for text in [
            "2001:200::1",
            "2001:4860:4860::8888",
            "2606:4700::6810:1",
            "2003::1",
            "2a04:4e42::223",
            "3ffe::1",
            "3fff:1000::1",
        ] {
            check(text, true);
        }
    }

    #[test]
    fn an_address_of_this_machine_is_told() {
        assert!(is_own([127, 0, 0, 1].into()));
        // Not loopback, but whatever this machine would speak from; nothing where it has no other network.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("198.51.100.1:9").is_ok() {
            let own = socket.local_addr().unwrap().ip();
            assert!(is_own(own) && !is_own([198, 51, 100, 1].into()), "{own}");
        }
    }
}
