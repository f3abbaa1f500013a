// Package namespacetest makes a test's program the launcher of what the test starts in
// namespaces.
package namespacetest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/smolvm/smolvm/internal/namespace"
	"github.com/smolvm/smolvm/internal/namespace/launcher"
	"github.com/smolvm/smolvm/internal/testenv"
)

// argument is the first of a program that is to be a launcher.
const argument = "namespacetest-launcher"

// Program returns the program for [namespace.Options]: the test's own, which calls [Main].
func Program() []string { return []string{os.Args[0], argument} }

// Main makes this process the launcher if it was started as [Program], and ends it then. It is
// to be called first in TestMain.
func Main() {
	if len(os.Args) < 2 || os.Args[1] != argument {
		return
	}
	if err := launch(); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "launcher:", err)
		os.Exit(1) //nolint:forbidigo // it is the main of a test's program
	}
	os.Exit(0) //nolint:forbidigo // as above
}

// Run runs a package's tests as [testenv.Main] does, and returns the status to exit with. It fails
// if they have left a goroutine.
func Run(m *testing.M) int {
	return testenv.Main(func() int {
		status := m.Run()
		if err := goleak.Find(); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return status
	})
}

func launch() error {
	line, err := bufio.NewReader(os.Stdin).ReadBytes('\n')
	if err != nil {
		return err
	}
	var orders namespace.Orders
	if err := json.Unmarshal(line, &orders); err != nil {
		return err
	}
	return launcher.Run(*orders.Launch)
}
