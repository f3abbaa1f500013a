package cli

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

func (a *app) policyLearnCommand() *cobra.Command {
	var options smolvm.LearnOptions
	cmd := &cobra.Command{
		Use:   "learn [flags] ID",
		Short: "Print the smallest policy that allows what a VM was seen to need",
		Long: `Print the smallest egress policy that allows the connections that are in a VM's flow log, as
flags of "smolvm policy set" and "smolvm run". It denies by default. Rules are by name where the
guest had asked for one, and else by address, each with port and protocol. Nothing is set: read
it first, as the guest has chosen what is in it.

Run what you want to allow in a VM without a policy, and learn from that.`,
		Example: `  smolvm policy learn web
  smolvm policy learn web --json | jq .policy | smolvm policy set web --file -`,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
	}
	cmd.Flags().BoolVar(&options.Denied, "denied", false, "allow what was denied too, but for what is closed always")
	cmd.Flags().BoolVar(&options.Wildcards, "wildcards", false, "allow all names below a domain of which several were seen, as in *.example.com")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			learned, err := m.LearnEgress(cmd.Context(), args[0], options)
			if err != nil {
				return withFlowHint(err, args[0])
			}
			if a.json {
				return a.printJSON(learned)
			}
			for _, text := range learned.Uncovered {
				a.errorf("smolvm: not covered: %s", text)
			}
			return a.println(egressArgs(learned.Policy))
		})
	})
	return cmd
}

// egressArgs returns the flags that describe a policy, quoted for a shell.
func egressArgs(policy smolvm.EgressPolicy) string {
	var b strings.Builder
	b.WriteString("--egress " + string(policy.Default))
	for _, rule := range policy.Rules {
		action, target, _ := strings.Cut(rule, " ")
		if strings.ContainsAny(target, "*[]@") {
			target = "'" + target + "'"
		}
		b.WriteString(" --" + action + " " + target)
	}
	return b.String()
}
