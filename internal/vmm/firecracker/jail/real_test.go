package jail_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/namespacetest"
	"github.com/smolvm/smolvm/internal/testenv"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/jail"
)

// The released Firecracker uses what is in its jail: files, TAP and sockets. It needs no KVM
// before it starts a guest.
func TestFirecracker(t *testing.T) {
	h := newHost(t)
	h.firecracker = testenv.Program(t, "firecracker")
	config := h.config("a")
	j, err := jail.New(config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := jail.Remove(config.Dir); err != nil {
			t.Error(err)
		}
	}()
	api := listenFor(t, j.Root(), "api.sock")
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	link := os.NewFile(uintptr(ends[0]), "link")
	defer func() { _, _ = link.Close(), unix.Close(ends[1]) }()
	log, err := os.Create(filepath.Join(h.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(h.firecracker, "--api-sock", "api.sock")
	cmd.Stdout, cmd.Stderr = log, log
	process, err := j.Start(t.Context(), cmd, nil, namespacetest.Program(), &namespace.Network{Link: link})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := process.Kill(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("Firecracker has ended with %s: %s", process.Exit(), text)
		}
	}()
	client := api(process.Done())
	for _, call := range [][2]string{
		{"/boot-source", `{"kernel_image_path": "kernel"}`},
		{"/drives/drive0", `{"drive_id": "drive0", "path_on_host": "drive0", "is_root_device": false}`},
		{"/network-interfaces/eth0", `{"iface_id": "eth0", "host_dev_name": "tap0"}`},
		{"/vsock", `{"guest_cid": 3, "uds_path": "vsock.sock"}`},
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://localhost"+call[0], strings.NewReader(call[1]))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(answer.Body)
		_ = answer.Body.Close()
		if answer.StatusCode != http.StatusNoContent {
			t.Errorf("PUT %s: %s, %s", call[0], answer.Status, text)
		}
	}
	client.CloseIdleConnections()
	if got := status(t, process.PID(), "CapEff"); strings.Trim(got, "0") != "" {
		t.Errorf("it has the capabilities %s", got)
	}
	if program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", process.PID())); err != nil || filepath.Base(program) != "firecracker" {
		t.Errorf("process %d runs %s, %v", process.PID(), program, err)
	}
}

// listenFor returns what waits for a socket in a directory that is not there yet, and a client
// of it.
func listenFor(t *testing.T, dir, name string) func(ended <-chan struct{}) *http.Client {
	t.Helper()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_ATTRIB); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/self/fd/%d/%s", root.Fd(), name)
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	return func(ended <-chan struct{}) *http.Client {
		t.Helper()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			select {
			case <-ended:
				_ = events.Close()
			case <-stop:
			}
		}()
		for {
			conn, err := dial(t.Context(), "", "")
			if err == nil {
				_, _ = conn.Close(), events.Close()
				return &http.Client{Transport: &http.Transport{DialContext: dial}}
			}
			if errors.Is(err, unix.ECONNREFUSED) {
				time.Sleep(time.Millisecond) // it listens a moment later, which nothing tells
				continue
			}
			if _, err := events.Read(make([]byte, 4096)); err != nil {
				t.Fatal("Firecracker has made no socket: ", err)
			}
		}
	}
}
