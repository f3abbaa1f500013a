package manager

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/tapnet"
)

// namesTime is how long the host's name servers may take to answer a diagnosis.
const namesTime = 10 * time.Second

// CheckNetwork finds out what stops the packets of guests on this host, and reports each finding,
// the good ones too. For network mode user it looks whether this process may send, and whether the
// host's name servers answer. For mode tap it makes a throwaway network and sends packets as a
// guest would, none of which leaves the host; without the privileges for that it says so.
func (m *Manager) CheckNetwork(ctx context.Context) ([]smolvm.Finding, error) {
	findings := []smolvm.Finding{checkSockets(ctx), checkNames(ctx)}
	tap, err := m.checkTAP(ctx)
	return append(findings, tap...), err
}

// checkSockets finds out whether this process may send to the outside.
func checkSockets(ctx context.Context) smolvm.Finding {
	f := smolvm.Finding{
		Name: "network user: sockets", Severity: smolvm.SeverityOK, Problem: "the host has a route to the outside",
		Why: "what guests send is sent from sockets of this host",
	}
	// An address that nobody has (RFC 5737), to which nothing is sent.
	conn, err := new(net.Dialer).DialContext(ctx, "udp4", "192.0.2.1:9")
	if err != nil {
		f.Severity, f.Problem = smolvm.SeverityWarning, fmt.Sprintf("guests reach nothing outside: %v", err)
		f.Fix = "ip route"
		return f
	}
	_ = conn.Close()
	return f
}

// checkNames finds out whether the host's name servers answer.
func checkNames(ctx context.Context) smolvm.Finding {
	f := smolvm.Finding{
		Name: "network user: names", Severity: smolvm.SeverityOK, Problem: "the host's name servers answer",
		Why: "guests are told what they say",
	}
	ctx, cancel := context.WithTimeout(ctx, namesTime)
	defer cancel()
	resolver := net.Resolver{PreferGo: true}
	_, err := resolver.LookupNS(ctx, ".")
	// That there is nothing is an answer too.
	if missing, ok := errors.AsType[*net.DNSError](err); err != nil && (!ok || !missing.IsNotFound) {
		f.Severity, f.Problem = smolvm.SeverityWarning, fmt.Sprintf("names are not resolved: %v", err)
		f.Fix = "cat /etc/resolv.conf"
	}
	return f
}

// tapName is the name of the finding about network mode tap.
const tapName = "network tap"

// checkTAP finds out what stops packets in network mode tap.
func (m *Manager) checkTAP(ctx context.Context) ([]smolvm.Finding, error) {
	const why = "in network mode tap the host's kernel forwards what guests send"
	config, owner, err := m.throwaway(ctx)
	var obstacles []tapnet.Obstacle
	if err == nil {
		obstacles, err = tapnet.Diagnose(ctx, config, owner)
	}
	switch {
	case errors.Is(err, os.ErrPermission), errors.Is(err, os.ErrNotExist), errors.Is(err, smolvm.ErrUnsupported):
		return []smolvm.Finding{{
			Name: tapName, Severity: smolvm.SeverityWarning, Fix: "sudo smolvm doctor --network", Why: why + "; mode user needs none of it",
			Problem: fmt.Sprintf("not checked, as it takes root or CAP_NET_ADMIN, and /dev/net/tun: %v", err),
		}}, nil
	case errors.Is(err, tapnet.ErrPoolCollides):
		obstacles = []tapnet.Obstacle{{What: "packets to guests", Problem: err.Error(), Fix: smolvm.HintOf(err)}}
	case err != nil:
		return nil, fmt.Errorf("find out what stops packets of guests: %w", err)
	}
	if len(obstacles) == 0 {
		return []smolvm.Finding{{
			Name: tapName, Severity: smolvm.SeverityOK, Why: why,
			Problem: "packets of guests, and their questions for names, pass all firewalls",
		}}, nil
	}
	var findings []smolvm.Finding
	for _, o := range obstacles {
		findings = append(findings, smolvm.Finding{
			Name: tapName, Severity: smolvm.SeverityError, Why: why, Problem: o.What + ": " + o.Problem, Fix: o.Fix,
		})
	}
	return findings, nil
}

// throwaway returns the network of a guest that there is not, with the last address that VMs of the
// data directory would get.
func (m *Manager) throwaway(ctx context.Context) (network.Config, tapnet.Owner, error) {
	fail := func(err error) (network.Config, tapnet.Owner, error) { return network.Config{}, tapnet.Owner{}, err }
	if err := tapnet.CheckHost(""); err != nil {
		return fail(err)
	}
	pool, err := m.poolFor(ctx, smolvm.VMConfig{Network: smolvm.Network{Mode: smolvm.NetworkTAP}})
	if err != nil {
		return fail(err)
	}
	at, err := network.PlanIn(pool, smolvm.NetworkTAP, network.LastLease(pool))
	if err != nil {
		return fail(err)
	}
	owner, err := tapnet.OwnedBy(m.networkDirectory(), "doctor")
	return at.Config(), owner, err
}
