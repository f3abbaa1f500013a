package network

import (
	"net/netip"
	"slices"

	"github.com/smolvm/smolvm"
)

// Closed is why a flow is closed always: whatever the default says, and whatever rules say
// that are about more than it. A rule opens what is closed if it is about nothing else, as
// "allow 169.254.169.254" is.
type Closed string

const (
	// ClosedNoHost is an address of no other host: loopback, multicast, broadcast. No rule
	// opens it.
	ClosedNoHost Closed = "no-host"
	// ClosedHost is an address that reaches the host itself. A rule about @host opens it.
	ClosedHost Closed = "host"
	// ClosedVMs is an address in a network of VMs. A rule about @vms opens it.
	ClosedVMs Closed = "vms"
	// ClosedLinkLocal is an address on the host's own links. A rule with an address or a
	// network there opens it.
	ClosedLinkLocal Closed = "link-local"
	// ClosedMetadata is a metadata service of a cloud. A rule with its address opens it.
	ClosedMetadata Closed = "metadata"
	// ClosedForeignDNS is a name server that is not the sandbox's, if the policy denies
	// anything by name or by default: by its port (53, 853), or one known for DNS over HTTPS.
	// A rule with nothing but the port opens it, and for HTTPS one with the address or the
	// exact name.
	ClosedForeignDNS Closed = "foreign-dns"
)

// why returns what a flow is to, as the end of a sentence.
func (c Closed) why() string {
	switch c {
	case ClosedNoHost:
		return "no address of another host"
	case ClosedHost:
		return "the host's own"
	case ClosedVMs:
		return "in the VM's own network, or that of other VMs"
	case ClosedLinkLocal:
		return "on the host's own link, where clouds have their metadata"
	case ClosedMetadata:
		return "a metadata service of a cloud"
	case ClosedForeignDNS:
		return "a name server that is not the sandbox's"
	}
	return string(c)
}

const (
	dnsPort        = 53
	dnsOverTLSPort = 853 // and DNS over QUIC
	httpsPort      = 443
)

// closedTo returns all reasons for which a flow is closed always. Restricted reports that the
// policy needs the sandbox's resolver to be the only one.
func closedTo(f Flow, v view, restricted bool) []Closed {
	var closed []Closed
	add := func(is bool, why Closed) {
		if is && !slices.Contains(closed, why) {
			closed = append(closed, why)
		}
	}
	for _, addr := range withEmbedded(f.To.Addr()) {
		add(slices.Contains(metadataServices, addr), ClosedMetadata)
		add(addr.IsLinkLocalUnicast(), ClosedLinkLocal)
		// 0.0.0.0/8 is "this host on this network" (RFC 6890), which Linux takes literally.
		add(!addr.IsLinkLocalUnicast() && !addr.IsGlobalUnicast() || addr.Is4() && addr.As4()[0] == 0, ClosedNoHost)
		add(restricted && f.To.Port() == httpsPort && slices.Contains(resolverAddrs, addr), ClosedForeignDNS)
	}
	add(f.Host, ClosedHost)
	add(f.VMs, ClosedVMs)
	hasPorts := f.Protocol != ICMP
	add(restricted && hasPorts && (f.To.Port() == dnsPort || f.To.Port() == dnsOverTLSPort), ClosedForeignDNS)
	add(restricted && hasPorts && slices.ContainsFunc(v.names, isResolverName), ClosedForeignDNS)
	return closed
}

// withEmbedded returns an address, and the IPv4 address in it where a gateway of the host's
// network, or the host itself, would send on to that one: by NAT64 (RFC 6052) or 6to4 (RFC
// 3056).
func withEmbedded(addr netip.Addr) []netip.Addr {
	all := []netip.Addr{addr}
	if !addr.Is6() {
		return all
	}
	bytes := addr.As16()
	switch {
	case netip.PrefixFrom(netip.AddrFrom16([16]byte{0x00, 0x64, 0xff, 0x9b}), 96).Contains(addr):
		all = append(all, netip.AddrFrom4([4]byte(bytes[12:])))
	case netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x02}), 16).Contains(addr):
		all = append(all, netip.AddrFrom4([4]byte(bytes[2:])))
	}
	return all
}

// isPublic reports whether an address is one of the internet's, and so of whoever has a name
// lead to it; private networks are somebody's own.
func isPublic(addr netip.Addr) bool {
	for _, addr := range withEmbedded(addr) {
		if !addr.IsGlobalUnicast() || addr.IsPrivate() ||
			slices.ContainsFunc(sharedNetworks, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			return false
		}
	}
	return true
}

// sharedNetworks are private like those of [netip.Addr.IsPrivate]; see the registries of RFC
// 6890.
var sharedNetworks = []netip.Prefix{
	netip.MustParsePrefix("100.64.0.0/10"), // shared address space of carriers (RFC 6598)
	netip.MustParsePrefix("192.0.0.0/24"),  // IETF protocol assignments
	netip.MustParsePrefix("198.18.0.0/15"), // benchmarks (RFC 2544)
	netip.MustParsePrefix("fec0::/10"),     // site-local addresses of old (RFC 3879)
}

// linkLocal are the networks of [ClosedLinkLocal].
var linkLocal = []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}

// isResolverName reports whether a name is one known for DNS over HTTPS.
func isResolverName(name string) bool { return slices.Contains(resolverNames, name) }

// resolverNames and resolverAddrs are of public resolvers that answer over HTTPS, as their
// operators publish them. A list like this one is never whole: under a policy that denies by
// default others are closed as everything is.
var resolverNames = []string{
	"dns.google", "dns.google.com", "dns64.dns.google",
	"cloudflare-dns.com", "one.one.one.one", "1dot1dot1dot1.cloudflare-dns.com", "mozilla.cloudflare-dns.com",
	"chrome.cloudflare-dns.com", "security.cloudflare-dns.com", "family.cloudflare-dns.com",
	"dns.quad9.net", "dns9.quad9.net", "dns10.quad9.net", "dns11.quad9.net",
	"doh.opendns.com", "doh.familyshield.opendns.com", "dns.opendns.com",
	"dns.adguard-dns.com", "dns.adguard.com", "dns.nextdns.io", "doh.cleanbrowsing.org", "doh.mullvad.net", "dns.mullvad.net",
	"dns.alidns.com", "doh.pub", "dns0.eu",
}

var resolverAddrs = []netip.Addr{
	netip.AddrFrom4([4]byte{8, 8, 8, 8}), netip.AddrFrom4([4]byte{8, 8, 4, 4}), // Google
	netip.MustParseAddr("2001:4860:4860::8888"), netip.MustParseAddr("2001:4860:4860::8844"),
	netip.AddrFrom4([4]byte{1, 1, 1, 1}), netip.AddrFrom4([4]byte{1, 0, 0, 1}), // Cloudflare
	netip.AddrFrom4([4]byte{1, 1, 1, 2}), netip.AddrFrom4([4]byte{1, 0, 0, 2}),
	netip.AddrFrom4([4]byte{1, 1, 1, 3}), netip.AddrFrom4([4]byte{1, 0, 0, 3}),
	netip.MustParseAddr("2606:4700:4700::1111"), netip.MustParseAddr("2606:4700:4700::1001"),
	netip.AddrFrom4([4]byte{9, 9, 9, 9}), netip.AddrFrom4([4]byte{149, 112, 112, 112}), // Quad9
	netip.MustParseAddr("2620:fe::fe"), netip.MustParseAddr("2620:fe::9"),
	netip.AddrFrom4([4]byte{208, 67, 222, 222}), netip.AddrFrom4([4]byte{208, 67, 220, 220}), // OpenDNS
	netip.AddrFrom4([4]byte{94, 140, 14, 14}), netip.AddrFrom4([4]byte{94, 140, 15, 15}), // AdGuard
}

// MetadataServices returns the addresses of [ClosedMetadata].
func MetadataServices() []netip.Addr { return slices.Clone(metadataServices) }

// ClosedNetworks returns the networks whose addresses are closed always for what they are, so
// not those of the host and of VMs: [ClosedNoHost], [ClosedLinkLocal] and [ClosedMetadata].
// None overlaps another.
func ClosedNetworks() []netip.Prefix {
	closed := []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"),
		netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
		netip.MustParsePrefix("::/127"), netip.MustParsePrefix("::ffff:0:0/96"), netip.MustParsePrefix("ff00::/8"),
	}
	closed = append(closed, linkLocal...)
	for _, addr := range metadataServices {
		closed = append(closed, netip.PrefixFrom(addr, addr.BitLen()))
	}
	for _, prefix := range slices.Clone(closed) {
		if prefix.Addr().Is4() { // as [withEmbedded] finds it
			at := prefix.Addr().As4()
			nat64, to4 := [16]byte{0x00, 0x64, 0xff, 0x9b}, [16]byte{0x20, 0x02}
			copy(nat64[12:], at[:])
			copy(to4[2:], at[:])
			closed = append(closed,
				netip.PrefixFrom(netip.AddrFrom16(nat64), 96+prefix.Bits()), netip.PrefixFrom(netip.AddrFrom16(to4), 16+prefix.Bits()))
		}
	}
	return closed
}

// metadataServices are the addresses outside of 169.254.0.0/16 and fe80::/10 where clouds
// tell a virtual machine who it is, and give credentials to whoever asks from there. On a
// host in such a cloud a guest would be given the host's.
var metadataServices = []netip.Addr{
	// Azure's WireServer, of which agents get certificates and settings:
	// learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
	netip.AddrFrom4([4]byte{168, 63, 129, 16}),
	// Alibaba Cloud: alibabacloud.com/help/en/ecs/user-guide/view-instance-metadata
	netip.AddrFrom4([4]byte{100, 100, 100, 200}),
	// Oracle Cloud Infrastructure Classic: docs.oracle.com/en/cloud/iaas/compute-iaas-cloud/stcsg,
	// "Retrieving Instance Metadata"
	netip.AddrFrom4([4]byte{192, 0, 0, 192}),
	// AWS by IPv6: docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html
	netip.MustParseAddr("fd00:ec2::254"),
	// AWS's credentials for pods by IPv6: docs.aws.amazon.com/eks/latest/userguide/pod-id-how-it-works.html
	netip.MustParseAddr("fd00:ec2::23"),
	// Google Cloud by IPv6: cloud.google.com/compute/docs/metadata/querying-metadata
	netip.MustParseAddr("fd20:ce::254"),
	// Oracle Cloud by IPv6: docs.oracle.com/iaas/Content/Compute/Tasks/gettingmetadata.htm
	netip.MustParseAddr("fd00:c1::a9fe:a9fe"),
	// Scaleway by IPv6: scaleway.com/en/docs/instances/how-to/use-metadata
	netip.MustParseAddr("fd00:42::42"),
}

// opensAll reports whether a rule opens all of what is closed.
func (r Rule) opensAll(closed []Closed) bool {
	return !slices.ContainsFunc(closed, func(c Closed) bool { return !r.opens(c) })
}

// opens reports whether a rule is about nothing but what is closed for a reason.
func (r Rule) opens(c Closed) bool {
	switch c {
	case ClosedHost:
		return r.Place == PlaceHost
	case ClosedVMs:
		return r.Place == PlaceVMs
	case ClosedLinkLocal:
		return slices.ContainsFunc(linkLocal, func(p netip.Prefix) bool { return includesPrefix(p, r.CIDR) })
	case ClosedMetadata:
		return r.CIDR.IsSingleIP() && slices.Contains(metadataServices, r.CIDR.Addr())
	case ClosedForeignDNS:
		only := func(port uint16) bool { return r.Ports == Ports{port, port} }
		return only(dnsPort) || only(dnsOverTLSPort) || isResolverName(r.Domain) ||
			r.CIDR.IsSingleIP() && slices.Contains(resolverAddrs, r.CIDR.Addr())
	case ClosedNoHost:
	}
	return false
}

// ICMP is the third protocol that a [Flow] may have, beside those of port forwards. It is
// ICMPv6 for IPv6.
const ICMP smolvm.Protocol = "icmp"
