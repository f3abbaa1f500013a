// Job runs a job end to end in a VM of its own: it copies a source tree in, runs a
// shell pipeline over it, and copies the result out.
//
//	go run ./examples/job [source directory] [result file]
//
// It is the shim of its VM itself, so it does not need the smolvm program. If it must build
// the image, it takes the smolvm-agent program from beside itself or PATH (`make build`, then
// PATH=$PWD/bin:$PATH).
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/manager"
	"github.com/smolvm/smolvm/shim"
)

// pipeline counts the lines of each kind of file in the tree.
const pipeline = `
find . -type f | while read -r file; do
	echo "${file##*.} $(wc -l < "$file")"
done | awk '{ lines[$1] += $2 } END { for (kind in lines) print lines[kind], kind }' | sort -rn > /tmp/result
`

func main() {
	shim.Main() // does not return in the process beside the VM
	source, result := ".", "lines.txt"
	if len(os.Args) > 1 {
		source = os.Args[1]
	}
	if len(os.Args) > 2 {
		result = os.Args[2]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, manager.Config{Embedded: true}, source, result)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "job:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, config manager.Config, source, result string) error {
	m, err := manager.Open(ctx, config)
	if err != nil {
		return err
	}
	defer func() { _ = m.Close() }()

	// Ephemeral: the VM goes when this program does, even if it is killed.
	info, err := m.Create(ctx, smolvm.VMConfig{Ephemeral: true}, smolvm.CreateOptions{})
	if err != nil {
		return err
	}
	vm := m.VM(info.ID)
	defer func() { _ = vm.Delete(context.WithoutCancel(ctx), smolvm.DeleteOptions{}) }()
	if _, err := vm.Start(ctx, smolvm.StartOptions{}); err != nil {
		return err
	}

	if err := vm.CopyTo(ctx, source, "/tmp/source"); err != nil {
		return err
	}
	status, err := vm.Exec(ctx, smolvm.Command{
		Args:   []string{"sh", "-euc", pipeline},
		Dir:    "/tmp/source",
		Stdout: os.Stdout,
		Stderr: os.Stderr,
	})
	if err != nil {
		return err
	}
	if !status.Success() {
		return fmt.Errorf("the pipeline ended with %s", status)
	}
	return vm.CopyFrom(ctx, "/tmp/result", result)
}
