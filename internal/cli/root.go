package cli

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/vmm/traits"
)

// Groups of commands in the help text.
const (
	groupVM    = "vm"
	groupUse   = "use"
	groupImage = "image"
	groupHost  = "host"
)

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "smolvm",
		Short:         "Disposable VMs for code that you don't trust",
		Long:          rootLong,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.ArbitraryArgs, // so that requireSubcommand sees an unknown one
		RunE:          a.requireSubcommand,
	}
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	root.SetUsageTemplate(usageTemplate)
	root.CompletionOptions.DisableDefaultCmd = true

	flags := root.PersistentFlags()
	flags.StringVar(&a.dataDir, "data-dir", "", "keep VMs and images in `DIR`")
	flags.StringVar(&a.socketDir, "socket-dir", "", "keep sockets of running VMs in `DIR`")
	flags.StringVar(&a.backend, "backend", "", "run VMs by `BACKEND`: auto, firecracker or qemu")
	flags.BoolVar(&a.json, "json", false, "print data as JSON")
	complete(root, "data-dir", directories)
	complete(root, "socket-dir", directories)
	complete(root, "backend", words(backendNames()...))

	root.AddGroup(
		&cobra.Group{ID: groupVM, Title: "VMs:"},
		&cobra.Group{ID: groupUse, Title: "Work in a VM:"},
		&cobra.Group{ID: groupImage, Title: "Images, templates and pools:"},
		&cobra.Group{ID: groupHost, Title: "This host:"},
	)
	root.SetHelpCommandGroupID(groupHost)
	addTo(root, groupVM, a.runCommand(), a.createCommand(), a.startCommand(), a.stopCommand(),
		a.pauseCommand(), a.resizeCommand(), a.resumeCommand(), a.rmCommand(), a.lsCommand(), a.inspectCommand(), a.logsCommand(), a.portCommand(),
		a.policyCommand(), a.flowsCommand(), a.snapshotCommand(), a.forkCommand())
	addTo(root, groupUse, a.execCommand(), a.shellCommand(), a.cpCommand(), a.diffCommand(), a.applyCommand(), a.sshCommand())
	addTo(root, groupImage, a.imageCommand(), a.templateCommand(), a.poolCommand())
	addTo(root, groupHost, a.doctorCommand(), a.eventsCommand(), a.reconcileCommand(),
		a.versionCommand(), a.completionCommand())
	root.AddCommand(a.manCommand(), a.sshProxyCommand())
	return root
}

// addTo adds commands in a group.
func addTo(parent *cobra.Command, group string, commands ...*cobra.Command) {
	for _, command := range commands {
		command.GroupID = group
		parent.AddCommand(command)
	}
}

// requireSubcommand runs a command that only has subcommands: it shows the command's help,
// or fails as there is no such subcommand.
func (a *app) requireSubcommand(cmd *cobra.Command, args []string) error {
	a.ran = true
	if len(args) == 0 {
		return cmd.Help()
	}
	err := usagef("unknown command %q of %s", args[0], cmd.CommandPath())
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	if near := nearest(args[0], names); near != "" {
		return withHint(err, "did you mean `%s %s`?", cmd.CommandPath(), near)
	}
	return err
}

// does makes the code of a command, from here on whose errors are no longer those of
// the command line's syntax.
func (a *app) does(run func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.ran = true
		a.makes = slices.Contains([]string{"create", "run", "build", "kernel", "pull", "import", "set", "doctor"}, cmd.Name())
		return run(cmd, args)
	}
}

// needs says which arguments a command takes, in the words of its usage line.
func needs(minimum, maximum int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < minimum:
			return fmt.Errorf("give %s", what)
		case maximum >= 0 && len(args) > maximum:
			return fmt.Errorf("too many arguments from %q on; give %s", args[maximum], what)
		}
		return nil
	}
}

const anyNumber = -1

// withID is the argument of a command that works on one VM.
var withID = needs(1, 1, "the id of a VM")

func backendNames() []string {
	names := []string{traits.Auto}
	for _, backend := range traits.All() {
		names = append(names, backend.Name)
	}
	return names
}

func stateNames() []string {
	var names []string
	for _, state := range smolvm.States() {
		names = append(names, string(state))
	}
	return names
}
