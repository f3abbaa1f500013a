package manager

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/distro"
	"github.com/smolvm/smolvm/internal/image/kernelbuild"
)

// BuildKernel builds a kernel for guests, unless it is there, and makes the default image with it;
// see [smolvm.Images].
func (m *Manager) BuildKernel(ctx context.Context, opts smolvm.KernelOptions) (smolvm.Kernel, error) {
	began := time.Now()
	fail := func(err error) (smolvm.Kernel, error) { return smolvm.Kernel{}, fmt.Errorf("build kernel: %w", err) }
	if err := m.budget.Check(); err != nil {
		return fail(err)
	}
	kernel, err := m.kernels.Build(ctx, opts)
	if err != nil {
		return fail(err)
	}
	if !opts.Unused {
		if _, err := m.baseImage(ctx, opts.Progress); err != nil {
			return fail(fmt.Errorf("make the default image with %s: %w", kernel.Name, err))
		}
	}
	m.note(ctx, "", "kernel-build", began, kernel.Name)
	return kernel, nil
}

// ResetKernel has images boot with the distribution's kernel again, from when they are made the next
// time; see [smolvm.Images].
func (m *Manager) ResetKernel(context.Context) error {
	if err := m.kernels.Reset(); err != nil {
		return fmt.Errorf("reset kernel: %w", err)
	}
	return nil
}

// openPackages opens the packages of the host's distribution, which images of packages share.
func (m *Manager) openPackages(ctx context.Context) (_ kernelbuild.Packages, closePackages func(), err error) {
	release := distro.HostRelease(runtime.GOARCH)
	unlock, err := distro.Builder{Dir: m.packaged.Dir}.Lock(ctx)
	if err != nil {
		return nil, nil, err
	}
	source, err := distro.OpenSource(m.packaged.Dir, release)
	if err != nil {
		unlock()
		return nil, nil, err
	}
	return source, unlock, nil
}
