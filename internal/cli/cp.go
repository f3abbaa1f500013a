package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const cpLong = `Copy files and directories, with their contents, into a VM, out of one, or between two.

ID:PATH is a path in the VM; without a leading / it starts at root's home directory.
A path of this host that has a colon in it can be written as ./PATH. As with cp -r and
docker cp, a directory that exists receives the source under its own name, or with SRC/.
the contents of the source. For several sources the destination must be a directory.
"-" is a tar stream: as the destination it goes to standard output; as the source it
comes from standard input, and the destination is a directory in a VM.

Modes, times, symbolic links and holes are kept, owners and hard links are not. A file
that exists keeps its owner and mode, and is replaced once the new one is complete, so a
copy that fails leaves the old file. It is overwritten in its place if it has several
names, is a mount point, or its directory can't be written to. A FIFO or a device as the
destination is written to; inside a directory FIFOs, devices and sockets are left out. Of
the kernel's file systems, such as /proc, only the directories are copied, unless the
source is in them.

A copy out of a VM can't harm this host: set-id bits are dropped, no link at the
destination is followed, and symbolic links that lead out of what is copied, absolute
ones too, are left out with a warning; --links all makes them as they are.

A file that can't be read or written is reported and left out, the rest is copied, and
the exit status is 1.`

const cpExample = `  smolvm cp main.py web:/srv/
  smolvm cp web:/var/log/messages .
  smolvm cp src/. README.md web:/srv/app
  smolvm cp web:/etc - | tar t
  smolvm cp web:/srv/data other:/srv`

// copyStream is the argument that stands for a tar stream.
const copyStream = "-"

func (a *app) cpCommand() *cobra.Command {
	var opts smolvm.CopyOptions
	cmd := &cobra.Command{
		Use:               "cp SRC... ID:DST | cp ID:SRC... DST",
		Short:             "Copy files into a VM, out of one, or between two",
		Long:              cpLong,
		Example:           cpExample,
		Args:              needs(2, anyNumber, "a source and a destination"),
		ValidArgsFunction: a.copyArgs,
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			sources, target, err := copyPlan(args)
			if err != nil {
				return err
			}
			opts.IntoDir = len(sources) > 1
			opts.Warn = a.warnOfCopy
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				var errs []error
				for _, source := range sources {
					if cmd.Context().Err() != nil {
						break // the error of the last one says so
					}
					errs = append(errs, a.copyOne(cmd.Context(), m, source, target, opts))
				}
				return errors.Join(errs...)
			})
		}),
	}
	flags := cmd.Flags()
	flags.Func("links", "make symbolic links from a VM that lead out of what is copied: `all` or none (default none)", func(text string) error {
		switch text {
		case "all":
			opts.KeepLinks = true
		case "none":
			opts.KeepLinks = false
		default:
			return fmt.Errorf("%q is neither all nor none", text)
		}
		return nil
	})
	flags.Func("max-size", "stop when the files from a VM have more than `SIZE` together: MiB, or as in 2G", func(text string) error {
		size, err := parseMebibytes(text)
		opts.MaxBytes = size << 20
		return err
	})
	return cmd
}

// copyPlan reads the arguments of cp.
func copyPlan(args []string) (sources []smolvm.CopyPath, target smolvm.CopyPath, err error) {
	paths := make([]smolvm.CopyPath, len(args))
	for i, arg := range args {
		paths[i] = parseCopyArg(arg)
		switch {
		case paths[i].Path == "" && paths[i].VM != "":
			return nil, target, usagef("%q has an empty path; write %s:. for root's home directory", arg, paths[i].VM)
		case paths[i].Path == "":
			return nil, target, usagef("argument %d is an empty path", i+1)
		}
	}
	last := len(paths) - 1
	sources, target = paths[:last], paths[last]
	for i, source := range sources {
		switch {
		case last > 1 && (isCopyStream(source) || isCopyStream(target)):
			return nil, target, usagef("\"-\" can only be the one source or the destination of one")
		case source.VM == "" && target.VM == "":
			return nil, target, usagef("neither %q nor %q is in a VM; write ID:PATH for a path in a VM", args[i], args[last])
		case source.VM == target.VM:
			return nil, target, usagef("%q and %q are in the same VM; `smolvm exec %s -- cp` copies there", args[i], args[last], target.VM)
		}
	}
	return sources, target, nil
}

func isCopyStream(path smolvm.CopyPath) bool { return path.VM == "" && path.Path == copyStream }

func (a *app) copyOne(ctx context.Context, m smolvm.Service, source, target smolvm.CopyPath, opts smolvm.CopyOptions) error {
	switch {
	case isCopyStream(source):
		return m.PutTree(ctx, target.VM, target.Path, a.Stdin, opts)
	case isCopyStream(target):
		stream, err := m.GetTree(ctx, source.VM, source.Path, opts)
		if err != nil {
			return err
		}
		_, err = io.Copy(a.Stdout, stream)
		return errors.Join(err, stream.Close())
	}
	return m.Copy(ctx, source, target, opts)
}

// warnOfCopy prints what a copy has left out.
func (a *app) warnOfCopy(warning smolvm.CopyWarning) {
	text := warning.String() // errorf makes it harmless
	if warning.Failed {
		a.errorf("smolvm: %s", text)
		return
	}
	a.errorf("smolvm: warning: %s", text)
}

// copyArgs completes to VMs and, as the shell does by itself, to files of the host.
func (a *app) copyArgs(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	ids, _ := a.vmIDs(smolvm.StateRunning)(cmd, nil, prefix)
	for i, described := range ids {
		id, _, _ := strings.Cut(described, "\t")
		ids[i] = id + ":"
	}
	return ids, cobra.ShellCompDirectiveNoSpace
}
