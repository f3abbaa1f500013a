package cli

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

const completionLong = `Print a script that completes smolvm's commands, flags, VMs and images on Tab.

  bash    source <(smolvm completion bash)
  zsh     source <(smolvm completion zsh)
  fish    smolvm completion fish | source

Put the line into your shell's start-up file to have completions in every shell.`

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "completion bash|zsh|fish",
		Short:             "Print a completion script for a shell",
		Long:              completionLong,
		Args:              needs(1, 1, "a shell: bash, zsh or fish"),
		ValidArgsFunction: first(words("bash", "zsh", "fish")),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(a.Stdout, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(a.Stdout)
			case "fish":
				return cmd.Root().GenFishCompletion(a.Stdout, true)
			}
			return usagef("unknown shell %q; use bash, zsh or fish", args[0])
		}),
	}
}

// complete registers the completion of a flag's value.
func complete(cmd *cobra.Command, flag string, function cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, function); err != nil {
		panic(err) // the flag is not there, or has one already: a slip of the pen
	}
}

// words completes to fixed words.
func words(list ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp)
}

func directories(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// first completes the first argument only.
func first(function cobra.CompletionFunc) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return function(cmd, args, prefix)
	}
}

// vmIDs completes to the ids of VMs in one of the states; none given: in any. Ids
// that are there already are left out.
func (a *app) vmIDs(states ...smolvm.VMState) cobra.CompletionFunc {
	return a.completeFrom(func(cmd *cobra.Command, m smolvm.Service, args []string) ([]string, error) {
		vms, err := m.List(cmd.Context(), smolvm.ListOptions{})
		var ids []string
		for _, vm := range vms {
			if (len(states) == 0 || slices.Contains(states, vm.State)) && !slices.Contains(args, vm.ID) {
				ids = append(ids, cobra.CompletionWithDesc(vm.ID, string(vm.State)))
			}
		}
		return ids, err
	})
}

// labels completes to the labels of VMs, as NAME=VALUE.
func (a *app) labels() cobra.CompletionFunc {
	return a.completeFrom(func(cmd *cobra.Command, m smolvm.Service, _ []string) ([]string, error) {
		vms, err := m.List(cmd.Context(), smolvm.ListOptions{})
		var labels []string
		for _, vm := range vms {
			for name, value := range vm.Config.Labels {
				labels = append(labels, name+"="+value)
			}
		}
		slices.Sort(labels)
		return slices.Compact(labels), err
	})
}

// imageNames completes to the names of images, and digests of those without.
func (a *app) imageNames() cobra.CompletionFunc {
	return a.completeFrom(func(cmd *cobra.Command, m smolvm.Service, args []string) ([]string, error) {
		images, err := m.Images(cmd.Context())
		var names []string
		for _, image := range images {
			candidates := image.Names
			if len(candidates) == 0 {
				candidates = []string{shortDigest(image.Digest)}
			}
			for _, name := range candidates {
				if !slices.Contains(args, name) {
					names = append(names, cobra.CompletionWithDesc(name, image.Source))
				}
			}
		}
		return names, err
	})
}

func (a *app) completeFrom(list func(*cobra.Command, smolvm.Service, []string) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var found []string
		err := a.withManager(cmd.Context(), func(m smolvm.Service) (err error) {
			found, err = list(cmd, m, args)
			return err
		})
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}
