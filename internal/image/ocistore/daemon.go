package ocistore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

// DaemonSockets returns the sockets at which the daemons of docker and podman may listen, the
// likeliest first: the one that $DOCKER_HOST names, docker's, podman's of this user, and
// podman's of root.
func DaemonSockets() []string {
	var sockets []string
	if socket, ok := strings.CutPrefix(os.Getenv("DOCKER_HOST"), "unix://"); ok {
		sockets = append(sockets, socket)
	}
	sockets = append(sockets, "/var/run/docker.sock")
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		sockets = append(sockets, filepath.Join(dir, "docker.sock"), filepath.Join(dir, "podman", "podman.sock"))
	}
	return append(sockets, "/run/podman/podman.sock")
}

// PullDaemon takes an image from the daemon of docker or podman that listens at a socket, and
// has the name mean it. The error matches [smolvm.ErrImageNotFound] if the daemon has no such
// image.
func (s *Store) PullDaemon(ctx context.Context, socket string, ref ociref.Ref, opts ImportOptions) (Image, error) {
	opts.Name = ref
	image, err := s.pullDaemon(ctx, socket, ref, opts)
	if err != nil {
		return Image{}, fmt.Errorf("take %s from the daemon at %s: %w", ref, socket, err)
	}
	return image, nil
}

// errNotSaved reports that a daemon can't hand an image over.
var errNotSaved = errors.New("the daemon does not hand the image over")

func (s *Store) pullDaemon(ctx context.Context, socket string, ref ociref.Ref, opts ImportOptions) (Image, error) {
	body, err := saveImage(ctx, socket, ref)
	if err != nil {
		return Image{}, err
	}
	defer func() { _ = body.Close() }()
	images, err := s.importArchive(ctx, body, opts)
	if err != nil {
		return Image{}, err
	}
	return images[0], nil
}

// saveImage asks a daemon for the archive of an image. Both daemons know the request:
// https://docs.docker.com/reference/api/engine, "Export several images".
func saveImage(ctx context.Context, socket string, ref ociref.Ref) (io.ReadCloser, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives:     true,
		ResponseHeaderTimeout: 5 * time.Minute, // docker may write the archive to its disk first
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	address := "http://daemon/images/get?" + url.Values{"names": {ref.String()}}.Encode()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	if err := transport.CheckError(response, http.StatusOK); err != nil {
		_ = response.Body.Close()
		if response.StatusCode == http.StatusNotFound {
			return nil, notFound(ref)
		}
		return nil, &smolvm.Error{Err: fmt.Errorf("%w: %w", errNotSaved, err), Hint: "does `docker save` work for it?"}
	}
	return response.Body, nil
}
