package cli_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
)

// A guest's console steers the operator's terminal only if that is asked for, and is
// passed on as it is elsewhere. It is read across the two files of its log (S8, S9).
func TestLogs(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.output("create", "--name", "web")
	defer h.output("rm", "web")
	dir := filepath.Join(h.dir, "data", "vms", "web")
	const older, newer = "older\r\n\x1b]0;owned\x07", "\x1b[32mgreen\x1b[2J\r\n\x9bmore\n"
	if err := errors.Join(
		os.MkdirAll(dir, 0o700),
		os.WriteFile(filepath.Join(dir, "console.log.1"), []byte(older), 0o600),
		os.WriteFile(filepath.Join(dir, "console.log"), []byte(newer), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	if got := h.output("logs", "web"); got != older+newer {
		t.Errorf("piped, the log is %q", got)
	}
	if got, want := h.output("logs", "-n", "2", "web"), "\x1b]0;owned\x07"+newer; got != want {
		t.Errorf("its last two lines are %q, want %q", got, want)
	}
	for _, test := range []struct {
		want string
		args []string
	}{
		{"older\r\n\x1b[32mgreen\r\n\ufffdmore\r\n\x1b[0m", []string{"logs", "web"}},
		{strings.ReplaceAll(older+newer, "\n", "\r\n"), []string{"logs", "--raw", "web"}},
	} {
		if got := h.onTerminal(test.args...); got != test.want {
			t.Errorf("on a terminal smolvm %s prints %q, want %q", strings.Join(test.args, " "), got, test.want)
		}
	}
}

// onTerminal is what a command prints on a terminal.
func (h *host) onTerminal(args ...string) string {
	h.t.Helper()
	master, terminal, err := pty.Open()
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = master.Close() }()
	cmd := h.command(args...)
	cmd.Stdout, cmd.Stderr = terminal, terminal
	err = cmd.Start()
	_ = terminal.Close()
	if err != nil {
		h.t.Fatal(err)
	}
	printed, _ := io.ReadAll(master) // it ends in an error (EIO) when nobody has the terminal any more
	if err := cmd.Wait(); err != nil {
		h.t.Errorf("smolvm %s: %v", strings.Join(args, " "), err)
	}
	return string(printed)
}
