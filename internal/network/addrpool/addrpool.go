// Package addrpool keeps the pools of addresses that a data directory's VMs have theirs in: one
// for all that ask for none, and those that were asked for. They do not overlap, so no two VMs
// of the directory have the same address.
package addrpool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/compat"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/network"
	"github.com/smolvm/smolvm/internal/network/tapnet"
)

// Book is where the pools of a data directory are written down.
type Book struct {
	// Path of the file, and Lock of the file that is locked while it is changed.
	Path, Lock string
	// Directory names the data directory, as [tapnet.DirectoryName] does.
	Directory string
	// InUse returns the pools that VMs have addresses in.
	InUse func(context.Context) ([]netip.Prefix, error)
}

// format is the number of what is written; see package compat.
const format = 1

// pools are those of a data directory, as they are written down.
type pools struct {
	Format int `json:"format"`
	// Default is that of VMs that ask for none; not valid: none was chosen yet.
	Default netip.Prefix `json:"default,omitzero"`
	// Asked are those that were asked for.
	Asked []netip.Prefix `json:"asked,omitempty"`
}

// Take returns the pool for a new VM: the one that is asked for, or if that is not valid, the
// directory's own. That is chosen when the first VM needs it, and once more if the host has got
// a route into it meanwhile; VMs keep theirs. The error matches [tapnet.ErrPoolCollides] if the
// host has routes into what is asked for, or has a hint if it overlaps another pool.
func (b Book) Take(ctx context.Context, asked netip.Prefix) (netip.Prefix, error) {
	if asked.IsValid() {
		if err := network.CheckPool(asked); err != nil {
			return netip.Prefix{}, err
		}
	}
	lock, err := os.OpenFile(b.Lock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return netip.Prefix{}, err
	}
	defer func() { _ = lock.Close() }()
	if err := flock.Lock(ctx, lock); err != nil {
		return netip.Prefix{}, fmt.Errorf("wait for another process that chooses a pool of addresses: %w", err)
	}
	known, err := b.read()
	if err != nil {
		return netip.Prefix{}, err
	}
	before := pools{known.Format, known.Default, slices.Clone(known.Asked)}
	pool, err := b.choose(ctx, &known, asked)
	if err != nil {
		return netip.Prefix{}, err
	}
	if known.Default == before.Default && slices.Equal(known.Asked, before.Asked) {
		return pool, nil
	}
	return pool, b.write(known)
}

func (b Book) choose(ctx context.Context, known *pools, asked netip.Prefix) (netip.Prefix, error) {
	if !asked.IsValid() {
		if known.Default.IsValid() {
			_, err := tapnet.ChoosePool(known.Default, b.Directory)
			if !errors.Is(err, tapnet.ErrPoolCollides) {
				return known.Default, err
			}
			known.Asked = append(known.Asked, known.Default) // as long as VMs have it
		}
		var err error
		known.Default, err = tapnet.ChoosePool(netip.Prefix{}, b.Directory, known.Asked...)
		return known.Default, err
	}
	if asked != known.Default && !slices.Contains(known.Asked, asked) {
		if err := b.makeRoom(ctx, known, asked); err != nil {
			return netip.Prefix{}, err
		}
		known.Asked = append(known.Asked, asked)
	}
	return tapnet.ChoosePool(asked, b.Directory)
}

// makeRoom forgets the pools that overlap one that is asked for, or returns an error if VMs have
// addresses in one of them.
func (b Book) makeRoom(ctx context.Context, known *pools, asked netip.Prefix) error {
	overlaps := func(p netip.Prefix) bool { return p.IsValid() && p.Overlaps(asked) }
	if !overlaps(known.Default) && !slices.ContainsFunc(known.Asked, overlaps) {
		return nil
	}
	used, err := b.InUse(ctx)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(used, overlaps); i >= 0 {
		return &smolvm.Error{
			Hint: fmt.Sprintf("ask for %s, for one that does not overlap it, or for none", used[i]),
			Err:  fmt.Errorf("pool %s overlaps pool %s, in which VMs of this data directory have addresses", asked, used[i]),
		}
	}
	if overlaps(known.Default) {
		known.Default = netip.Prefix{}
	}
	known.Asked = slices.DeleteFunc(known.Asked, overlaps)
	return nil
}

func (b Book) read() (pools, error) {
	known := pools{Format: format}
	text, err := os.ReadFile(b.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return known, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &known)
	}
	if err != nil {
		return known, fmt.Errorf("read the pools of addresses: %s: %w", b.Path, err)
	}
	return known, compat.Check(b.Path, known.Format, format)
}

func (b Book) write(known pools) error {
	text, err := json.Marshal(known)
	temp := b.Path + ".new"
	if err == nil {
		err = os.WriteFile(temp, append(text, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(temp, b.Path)
	}
	if err != nil {
		return fmt.Errorf("write down the pools of addresses: %w", errors.Join(err, os.Remove(temp)))
	}
	return nil
}
