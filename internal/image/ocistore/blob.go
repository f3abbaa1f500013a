package ocistore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/smolvm/smolvm/internal/durable"
	"github.com/smolvm/smolvm/internal/flock"
	"github.com/smolvm/smolvm/internal/step"
)

// partial is a blob that is not whole yet. Whoever has it, has its lock.
type partial struct {
	store  *Store
	file   *os.File
	digits string
	want   v1.Descriptor
	have   int64
	hash   hash.Hash
}

// claim takes what there is of a blob, when nobody else is fetching it any more. The first
// result is nil if the whole blob is there.
func (s *Store) claim(ctx context.Context, want v1.Descriptor) (*partial, error) {
	digits, err := hexOf(want.Digest.String())
	if err != nil {
		return nil, err
	}
	for !s.has(digits, want.Size) {
		p, err := s.take(ctx, want, digits)
		if err != nil || p != nil {
			return p, err
		}
	}
	return nil, nil
}

// take takes what there is of a blob, when nobody else has it any more. The result is nil if
// somebody has finished it meanwhile.
func (s *Store) take(ctx context.Context, want v1.Descriptor, digits string) (*partial, error) {
	path := s.path(partialDir, digits)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock.Lock(ctx, file); err != nil {
		return nil, err
	}
	held, err := file.Stat()
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if there, err := os.Stat(path); err != nil || !os.SameFile(held, there) {
		return nil, file.Close() // whoever had the lock has finished it
	}
	if s.has(digits, want.Size) {
		// It was finished after the caller had looked, and this file was made after that.
		return nil, errors.Join(os.Remove(path), file.Close())
	}
	p := &partial{store: s, file: file, digits: digits, want: want, hash: sha256.New()}
	if err := p.catchUp(ctx, held.Size()); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return p, nil
}

// catchUp reads what is there, as its hash is that of the whole.
func (p *partial) catchUp(ctx context.Context, size int64) error {
	if size > p.want.Size {
		return p.restart()
	}
	n, err := io.Copy(p.hash, contextReader{ctx, io.LimitReader(p.file, size)})
	p.have = n
	return err
}

// contextReader is a reader that fails when its context is done.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(b)
}

// restart gives up what is there.
func (p *partial) restart() error {
	p.hash.Reset()
	p.have = 0
	if err := p.file.Truncate(0); err != nil {
		return err
	}
	_, err := p.file.Seek(0, io.SeekStart)
	return err
}

// rest returns how many bytes are missing.
func (p *partial) rest() int64 { return p.want.Size - p.have }

// Write adds to what is there, up to what the whole is to have.
func (p *partial) Write(b []byte) (int, error) {
	if int64(len(b)) > p.rest() {
		return 0, fmt.Errorf("the content is longer than %d bytes", p.want.Size)
	}
	n, err := p.file.Write(b)
	p.hash.Write(b[:n])
	p.have += int64(n)
	return n, err
}

// finish checks the whole and makes it appear. What is wrong is given up.
func (p *partial) finish(ctx context.Context) error {
	if p.rest() != 0 {
		return fmt.Errorf("%d bytes of %d are there: %w", p.have, p.want.Size, io.ErrUnexpectedEOF)
	}
	if got := digestPrefix + hex.EncodeToString(p.hash.Sum(nil)); got != p.want.Digest.String() {
		return errors.Join(&DigestError{Want: p.want.Digest.String(), Got: got}, p.restart())
	}
	if err := p.file.Sync(); err != nil {
		return err
	}
	step.Reached(ctx, "image pull/fetched")
	if err := os.Rename(p.file.Name(), p.store.blobPath(p.digits)); err != nil {
		return err
	}
	step.Reached(ctx, "image pull/stored")
	return durable.Sync(p.store.path("blobs", algorithm))
}

// close lets others have it.
func (p *partial) close() { _ = p.file.Close() }

// copyBlob stores a blob that can be read from its beginning to its end.
func (s *Store) copyBlob(ctx context.Context, want v1.Descriptor, open func() (io.ReadCloser, error)) error {
	p, err := s.claim(ctx, want)
	if err != nil || p == nil {
		return err
	}
	defer p.close()
	from, err := open()
	if err != nil {
		return err
	}
	defer func() { _ = from.Close() }()
	if err := p.restart(); err != nil {
		return err
	}
	if _, err := io.Copy(p, contextReader{ctx, from}); err != nil {
		return err
	}
	return p.finish(ctx)
}
