package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/network"
)

const policyLong = `Say what a VM may reach. A policy has a default and rules, which are tried in order; the
first one that matches decides:

  ACTION TARGET[:PORTS][/PROTOCOL]

  ACTION    allow, deny
  TARGET    *               everything
            example.com     this name, and none below it
            *.example.com   all names below it, and not itself
            192.0.2.0/24    a network, or an address; IPv6 in brackets
            @host, @vms     this host, and networks of VMs
  PORTS     443 or 8000-8999
  PROTOCOL  tcp, udp, icmp

Closed always, unless a rule is about nothing else: this host, other VMs, link-local
addresses, and the metadata services of clouds. Under a policy that denies by default or by
name, only the sandbox's own resolver answers.`

func (a *app) policyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "policy",
		Short: "Say what a VM may reach",
		Long:  policyLong,
		Args:  cobra.ArbitraryArgs,
		RunE:  a.requireSubcommand,
	}
	cmd.AddCommand(a.policyShowCommand(), a.policySetCommand(), a.policyTestCommand(), a.policyLearnCommand())
	return cmd
}

func (a *app) policyShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Print the egress policy of a VM",
		Long: `Print the egress policy of a VM, its revision, and, for a fork or a VM that was restored
from a snapshot, the policy that it can't go beyond.`,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				state, err := m.Egress(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				return a.printEgress(state)
			})
		}),
	}
}

func (a *app) policySetCommand() *cobra.Command {
	var flags egressFlags
	var file string
	cmd := &cobra.Command{
		Use:   "set [flags] ID",
		Short: "Give a VM another egress policy, while it runs too",
		Long: `Give a VM another egress policy in place of the one that it has. If it runs, connections
that the policy does not allow end at once. Rules are tried in the order of the command line,
whether they allow or deny.

The policy of a fork, or of a VM that was restored from a snapshot, can only be made narrower
than that of its origin.`,
		Example: `  smolvm policy set web --egress deny --allow example.com:443/tcp --allow '*.example.com:443'
  smolvm policy set web --egress allow --deny 192.168.0.0/16
  smolvm policy show web --json | jq .policy > policy.json; smolvm policy set web --file policy.json`,
		Args:              withID,
		ValidArgsFunction: first(a.vmIDs()),
	}
	flags.register(cmd)
	cmd.Flags().StringVar(&file, "file", "", "read the policy from `FILE`, as JSON; - is standard input")
	cmd.MarkFlagsMutuallyExclusive("file", "egress")
	cmd.MarkFlagsMutuallyExclusive("file", "allow")
	cmd.MarkFlagsMutuallyExclusive("file", "deny")
	cmd.RunE = a.does(func(cmd *cobra.Command, args []string) error {
		policy, err := flags.policy()
		if err == nil && file != "" {
			policy, err = a.readPolicy(file)
		}
		if err != nil {
			return err
		}
		if policy == nil {
			return usagef("give a policy: --egress, or --file")
		}
		return a.withManager(cmd.Context(), func(m smolvm.Service) error {
			state, err := m.SetEgress(cmd.Context(), args[0], *policy)
			if err != nil {
				return err
			}
			return a.printEgress(state)
		})
	})
	return cmd
}

func (a *app) policyTestCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "test ID DEST",
		Short: "Say whether a VM may reach a destination, and which rule decides",
		Long: `Say whether a VM may reach a destination by its egress policy, and which rule decides.
Nothing is sent, and no name is resolved. The exit status is 1 if it is denied.

DEST is NAME or ADDRESS, with or without :PORT and /PROTOCOL, or a URL. A name is taken to
lead to a public address; NAME=ADDRESS names another one. Without a port, it is whether some
port may be reached.`,
		Example: "  smolvm policy test web https://example.com/\n  smolvm policy test web example.com=192.168.1.1:443\n" +
			"  smolvm policy test web 203.0.113.1:53/udp",
		Args:              needs(2, 2, "the id of a VM, and a destination"),
		ValidArgsFunction: first(a.vmIDs()),
		RunE: a.does(func(cmd *cobra.Command, args []string) error {
			if _, err := network.ParseDestination(args[1]); err != nil {
				return &usageError{err}
			}
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				verdict, err := m.TestEgress(cmd.Context(), args[0], args[1])
				if err != nil {
					return err
				}
				return a.printVerdict(verdict)
			})
		}),
	}
}

func (a *app) printVerdict(verdict smolvm.EgressVerdict) error {
	var err error
	if a.json {
		err = a.printJSON(verdict)
	} else {
		err = a.println(verdict.Reason)
	}
	if err == nil && !verdict.Allowed {
		err = &exitError{status: statusError}
	}
	return err
}

func (a *app) printEgress(state smolvm.EgressState) error {
	if a.json {
		return a.printJSON(state)
	}
	if err := a.println("revision " + strconv.FormatInt(state.Revision, 10)); err != nil {
		return err
	}
	if err := a.printPolicy("", state.Policy); err != nil || state.Within == nil {
		return err
	}
	if err := a.println("within:"); err != nil {
		return err
	}
	return a.printPolicy("  ", *state.Within)
}

func (a *app) printPolicy(indent string, policy smolvm.EgressPolicy) error {
	for i, rule := range policy.Rules {
		if err := a.println(fmt.Sprintf("%s%d. %s", indent, i+1, rule)); err != nil {
			return err
		}
	}
	otherwise := policy.Default
	if otherwise == "" {
		otherwise = smolvm.EgressAllow
	}
	return a.println(indent + "default " + string(otherwise))
}

// maxPolicyFile is how long a file with a policy may be, in bytes: more than the longest
// policy takes.
const maxPolicyFile = 1 << 20

func (a *app) readPolicy(path string) (*smolvm.EgressPolicy, error) {
	from := a.Stdin
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		from = file
	}
	// Bounded, and with a field that is not known an error, as in package network.
	var policy smolvm.EgressPolicy
	decoder := json.NewDecoder(io.LimitReader(from, maxPolicyFile))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&policy); err != nil {
		return nil, fmt.Errorf("read a policy from %s: %w", path, err)
	}
	return &policy, nil
}

// egressFlags are the flags that describe an egress policy.
type egressFlags struct {
	otherwise string
	rules     []string
	allows    bool
}

func (f *egressFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.otherwise, "egress", "", "`DEFAULT` for what the guest may reach: allow, deny or dns-only")
	rule := func(action string) func(string) error {
		return func(text string) error {
			rule := action + " " + text
			if _, err := network.ParseRule(rule); err != nil {
				return err
			}
			f.rules = append(f.rules, rule)
			f.allows = f.allows || action == string(network.Allow)
			return nil
		}
	}
	flags.Func("allow", "let the guest reach `TARGET[:PORTS][/PROTOCOL]`; see `smolvm policy` (repeatable)", rule(string(network.Allow)))
	flags.Func("deny", "keep the guest from `TARGET[:PORTS][/PROTOCOL]` (repeatable)", rule(string(network.Deny)))
	complete(cmd, "egress", words(string(smolvm.EgressAllow), string(smolvm.EgressDeny), string(smolvm.EgressDNSOnly)))
	complete(cmd, "allow", words())
	complete(cmd, "deny", words())
}

// policy returns the policy of the flags; nil: none was given.
func (f *egressFlags) policy() (*smolvm.EgressPolicy, error) {
	switch {
	case f.otherwise == "" && len(f.rules) == 0:
		return nil, nil //nolint:nilnil // None is what a VM has then.
	case f.otherwise == "" && f.allows:
		return nil, withHint(usagef("--allow without --egress: all that is not closed always is allowed already"),
			"add `--egress deny`, or `--egress allow` to open what is closed always")
	}
	policy := &smolvm.EgressPolicy{Default: smolvm.EgressDefault(f.otherwise), Rules: f.rules}
	if _, err := network.PolicyOf(*policy); err != nil {
		return nil, &usageError{err}
	}
	return policy, nil
}
