package outbound

import (
	"context"
	"net"

	"github.com/smolvm/smolvm/internal/network/intercept"
)

// SetSecrets has secrets put into flows that begin from now on; nil: there are none any more.
func (o *Outbound) SetSecrets(secrets *intercept.Interceptor) { o.secrets.Store(secrets) }

// hasSecrets reports whether a flow to a port may be one to the host of a secret. It has to
// state its name then before it is connected.
func (o *Outbound) hasSecrets(port uint16) bool {
	secrets := o.secrets.Load()
	return secrets != nil && secrets.HasPort(port)
}

// carrySecrets carries a flow whose name is known to its end, if it is one to the host of a
// secret by TLS that the guest may have. It reports whether it was.
func (o *Outbound) carrySecrets(f *tcpFlow) bool {
	secrets, flow := o.secrets.Load(), f.known()
	to := intercept.Target{Host: flow.Names.SNI, Port: flow.To.Port()}
	if f.outside != nil || secrets == nil || to.Host == "" || !secrets.Has(to) {
		return false
	}
	if !o.beginTCP(f) {
		f.Abort()
		return true
	}
	defer o.endTCP(f)
	f.recheck() // the policy may have been changed since
	o.beginRecord(&f.recording, f.known(), f.verdict(true))
	defer func() { o.endRecord(&f.recording, f.known(), f.verdict(true)) }()
	_ = secrets.Carry(o.ctx, f, intercept.Flow{
		To: to,
		Dial: func(ctx context.Context) (net.Conn, error) {
			flow := f.known() // each time its own, as it is judged anew
			return o.dialWithin(ctx, &flow)
		},
		Sent: f.addSecrets,
	})
	return true
}
