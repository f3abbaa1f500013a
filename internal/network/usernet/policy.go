package usernet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// errRefused matches the errors of what a guest may not do.
var errRefused = errors.New("the guest may not connect to this address")

// policy is what a guest may reach, as far as an address alone tells. Whether an address
// is the host's own at the moment is for [hostRoutes] to find out.
type policy struct {
	inside   netip.Prefix // the VM's own network, which holds nobody else
	metadata []netip.Addr // metadata services that are open to the guest
}

// allows returns an error that matches [errRefused] if the guest may not have an address,
// or a port of it, that is known to it by that name. The name is empty if there is none,
// the port is 0 if it does not matter. What connects the guest, and what tells it addresses
// that only the host knows, both ask here.
func (p policy) allows(name string, addr netip.Addr, port uint16) error {
	addr = addr.Unmap()
	refuse := func(why string) error {
		to := netip.AddrPortFrom(addr, port).String()
		if name != "" {
			to = name + " at " + to
		}
		return fmt.Errorf("%s: %w: it is %s", to, errRefused, why)
	}
	switch {
	case slices.Contains(p.metadata, addr):
		return nil
	case slices.Contains(metadataServices, addr):
		return refuse("a metadata service of a cloud")
	case addr.IsLinkLocalUnicast():
		return refuse("on the host's own link, where clouds have their metadata")
	case !addr.IsGlobalUnicast(), addr.Is4() && addr.As4()[0] == 0:
		// 0.0.0.0/8 is "this host on this network" (RFC 6890), which Linux takes literally.
		return refuse("no address of another host")
	case p.inside.Contains(addr):
		return refuse("in the VM's own network")
	}
	return nil
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
