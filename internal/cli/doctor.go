package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

const doctorLong = `Check what this host can do and what it lacks, and print for each lack the command that
fixes it. The exit status is 1 if VMs can't run here.

With --network it is about guests' packets instead. As root or with CAP_NET_ADMIN, a throwaway
guest of network mode tap sends some through all firewalls of this host, and what stops them is
named: which rule of whose table, forwarding that is off, the reverse path filter, or a route that
overlaps. None leaves the host. Without these privileges only what mode user needs is checked.`

func (a *app) doctorCommand() *cobra.Command {
	var network bool
	cmd := &cobra.Command{
		Use:               "doctor",
		Short:             "Check what this host lacks",
		Long:              doctorLong,
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
		RunE: a.does(func(cmd *cobra.Command, _ []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				check := func(ctx context.Context) ([]smolvm.Finding, error) { return m.CheckPrerequisites(ctx, a.backend) }
				if network {
					check = m.CheckNetwork
				}
				findings, err := check(cmd.Context())
				if err != nil {
					return err
				}
				if a.json {
					err = printList(a, findings)
				} else {
					err = a.printFindings(findings)
				}
				if err == nil && slices.ContainsFunc(findings, isFatal) {
					err = &exitError{status: statusError}
				}
				return err
			})
		}),
	}
	cmd.Flags().BoolVar(&network, "network", false, "find out what stops the packets of guests")
	return cmd
}

func isFatal(f smolvm.Finding) bool { return f.Severity == smolvm.SeverityError }

// printFindings prints a line for each finding, and below a bad one what it is about
// and what to do. Fixes are never cut, so that they can be copied.
func (a *app) printFindings(findings []smolvm.Finding) error {
	width := 0
	for _, f := range findings {
		width = max(width, len(f.Name))
	}
	color := colored(a.Stdout)
	var b strings.Builder
	for _, f := range findings {
		word := string(f.Severity)
		padding := strings.Repeat(" ", len(smolvm.SeverityWarning)-len(word))
		if color {
			word = paint(word, severityColor(f.Severity))
		}
		fmt.Fprintf(&b, "%s%s  %-*s  %s\n", word, padding, width, termsafe.Line(f.Name), termsafe.Line(f.Problem))
		if f.Severity == smolvm.SeverityOK {
			continue
		}
		for _, line := range [][2]string{{"why", f.Why}, {"fix", f.Fix}} {
			if line[1] != "" {
				fmt.Fprintf(&b, "%*s%s: %s\n", len(smolvm.SeverityWarning)+2, "", line[0], termsafe.Line(line[1]))
			}
		}
	}
	_, err := fmt.Fprint(a.Stdout, b.String())
	return err
}

func severityColor(severity smolvm.Severity) string {
	switch severity {
	case smolvm.SeverityOK:
		return green
	case smolvm.SeverityWarning:
		return yellow
	case smolvm.SeverityError:
		return red
	}
	return plain
}
