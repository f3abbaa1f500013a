package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/agent/wire"
	"github.com/smolvm/smolvm/internal/dockerbuild"
	"github.com/smolvm/smolvm/internal/image/ocilayer"
	"github.com/smolvm/smolvm/internal/workspace"
)

// BuildDockerfile builds an image from a Dockerfile. Files are copied on the host, and commands
// run in ephemeral VMs, with the network and the policy of opts.VM. What was built before is
// used again, step by step, until `image prune`.
//
// What is wrong with the Dockerfile, or with what one of its lines does, is a
// [*smolvm.DockerfileError]. The error matches [smolvm.ErrUnsupported] for what docker knows and
// smolvm refuses, and [smolvm.ErrDiskBudget].
func (m *Manager) BuildDockerfile(ctx context.Context, opts smolvm.DockerfileOptions) (smolvm.Image, error) {
	began := time.Now()
	if err := m.budget.Check(); err != nil {
		return smolvm.Image{}, fmt.Errorf("build image from a Dockerfile: %w", err)
	}
	builder := &dockerbuild.Builder{
		Catalog: m.catalog, Workspace: m.openWorkspace, Root: m.writeRoot, CacheDir: m.dir.BuildCaches(),
		BuiltIn: func(ctx context.Context, name string) (smolvm.Image, error) {
			return m.ensureImage(ctx, name, smolvm.PullMissing, nil)
		},
	}
	built, err := builder.Build(ctx, opts)
	if err != nil {
		return smolvm.Image{}, fmt.Errorf("build image: %w", err)
	}
	m.note(ctx, "", "image-build", began, strings.TrimSpace(strings.Join(opts.Tags, " ")+" "+built.Digest))
	return built, nil
}

// writeRoot writes the files of an image, as a VM sees them, as the archive of a layer.
func (m *Manager) writeRoot(ctx context.Context, image smolvm.Image, w io.Writer) (err error) {
	opened, err := m.openWorkspace(ctx, image, workspace.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, opened.Close(ctx)) }()
	client, err := m.client(ctx, opened.ID(), "read the files of")
	if err != nil {
		return err
	}
	return workspace.Checked(ctx, w, ocilayer.Limits{}, func(ctx context.Context, w io.Writer) error {
		return client.Root(ctx, nil, w, wire.RootRequest{})
	})
}
