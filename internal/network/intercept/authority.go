package intercept

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"
)

const (
	// authorityTime is how long the authority's certificate is valid: longer than a VM runs.
	authorityTime = 10 * 365 * 24 * time.Hour
	// leafTime is how long a server's is, and leafLeft how long one that is used has to be.
	leafTime, leafLeft = 30 * 24 * time.Hour, 10 * 24 * time.Hour
	// skew is how far behind the guest's clock may be.
	skew = 24 * time.Hour
)

// authority is the certificate authority of one VM. It may certify no hosts but those of the
// VM's secrets, so there are no more certificates than hosts.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	leafKey     *ecdsa.PrivateKey
	now         func() time.Time
	hosts       []string

	mu     sync.Mutex // guards the following
	leaves map[string]*tls.Certificate
}

// newAuthority makes an authority for hosts.
func newAuthority(hosts []string, now func() time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leafKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		// A name of its own, as a guest may know authorities of VMs that it was made of.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("smolvm VM authority %x", serial)},
		NotBefore:             now().Add(-skew),
		NotAfter:              now().Add(authorityTime),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		// Whoever gets the key can pretend to be these hosts to this guest, and no others.
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         hosts,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{
		certificate: certificate, key: key, leafKey: leafKey, now: now, hosts: hosts, leaves: map[string]*tls.Certificate{},
	}, nil
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw})
}

// leaf returns a certificate of a host, made at most once in leafTime.
func (a *authority) leaf(host string) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if made := a.leaves[host]; made != nil && a.now().Before(made.Leaf.NotAfter.Add(-leafLeft)) {
		return made, nil
	}
	if !slices.Contains(a.hosts, host) {
		return nil, fmt.Errorf("%s is the host of no secret", host)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: host[:min(len(host), maxCommonName)]},
		NotBefore:    a.now().Add(-skew),
		NotAfter:     a.now().Add(leafTime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     []string{host},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, a.leafKey.Public(), a.key)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	made := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: a.leafKey, Leaf: parsed}
	a.leaves[host] = made
	return made, nil
}

// maxCommonName is the longest common name of a certificate (RFC 5280, appendix A.1).
const maxCommonName = 64

// newSerial makes up a serial number, of 127 bits.
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}
