package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/termsafe"
)

const doctorLong = `Check what this host can do and what it lacks, and print for each lack the command that
fixes it. The exit status is 1 if VMs can't run here.`

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "doctor",
		Short:             "Check what this host lacks",
		Long:              doctorLong,
		Args:              needs(0, 0, "no arguments"),
		ValidArgsFunction: words(),
		RunE: a.does(func(cmd *cobra.Command, _ []string) error {
			return a.withManager(cmd.Context(), func(m smolvm.Service) error {
				findings, err := m.CheckPrerequisites(cmd.Context(), a.backend)
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
