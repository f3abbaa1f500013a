package identity

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/crypto/ssh"
)

// clientKeyName is the file of the key by which a data directory logs in to
// its VMs; the public half is beside it.
const clientKeyName = "id_ed25519"

// NewHostKey makes the SSH host key of a VM, as PEM in OpenSSH's private key format.
func NewHostKey(id string) (string, error) { return newKey("smolvm host " + id) }

// newKey makes a key pair as PEM in OpenSSH's private key format.
func newKey(comment string) (string, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make SSH key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return "", fmt.Errorf("encode SSH key: %w", err)
	}
	return string(pem.EncodeToMemory(block)), nil
}

// hostKey reads a private SSH host key.
func hostKey(text string) (ed25519.PrivateKey, error) {
	key, err := ssh.ParseRawPrivateKey([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("host key: %w", err)
	}
	private, ok := key.(*ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("host key is a %T, not one of Ed25519", key)
	}
	return *private, nil
}

// PublicHostKey returns the public half of a private SSH host key: what clients know a VM by.
func PublicHostKey(text string) (ssh.PublicKey, error) {
	private, err := hostKey(text)
	if err != nil {
		return nil, err
	}
	return ssh.NewPublicKey(private.Public())
}

// ParseAuthorizedKey reads a public key that may log in. Options before it would ask for
// what the guest's SSH server does not do, and so are refused.
func ParseAuthorizedKey(line string) (ssh.PublicKey, error) {
	key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, errors.New("is not a public key in OpenSSH's format")
	}
	if len(options) > 0 {
		return nil, fmt.Errorf("has the option %q; options are not supported", options[0])
	}
	return key, nil
}

// NewMachineID makes a value for /etc/machine-id.
func NewMachineID() string { return randomHex(16) }

// ClientKey reads the key by which a data directory logs in to its VMs, making it the first
// time.
func ClientKey(keysDir string) (ssh.Signer, error) {
	path := ClientKeyPath(keysDir)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeClientKey(keysDir); err != nil {
			return nil, err
		}
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("read SSH key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, fmt.Errorf("SSH key %s is damaged (%w); move it away, and a new one is made", path, err)
	}
	return signer, nil
}

// ClientKeyPath is the file of [ClientKey].
func ClientKeyPath(keysDir string) string { return filepath.Join(keysDir, clientKeyName) }

// makeClientKey makes the key so that of several processes that do it at once,
// one wins and all use the winner's.
func makeClientKey(keysDir string) error {
	if err := os.MkdirAll(keysDir, 0o700); err != nil {
		return fmt.Errorf("make SSH key: %w", err)
	}
	text, err := newKey("smolvm")
	if err != nil {
		return err
	}
	signer, err := ssh.ParsePrivateKey([]byte(text))
	if err != nil {
		return fmt.Errorf("make SSH key: %w", err)
	}
	temp, err := os.CreateTemp(keysDir, ".key-*") // mode 0600
	if err != nil {
		return fmt.Errorf("make SSH key: %w", err)
	}
	defer func() { _ = os.Remove(temp.Name()) }()
	_, writeErr := temp.WriteString(text)
	if err := errors.Join(writeErr, temp.Sync(), temp.Close()); err != nil {
		return fmt.Errorf("write SSH key: %w", err)
	}
	path := ClientKeyPath(keysDir)
	// A link fails where a rename would replace the key of a faster process.
	if err := os.Link(temp.Name(), path); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return fmt.Errorf("write SSH key: %w", err)
	}
	if err := os.WriteFile(path+".pub", ssh.MarshalAuthorizedKey(signer.PublicKey()), 0o644); err != nil {
		return fmt.Errorf("write SSH public key: %w", err)
	}
	return nil
}
