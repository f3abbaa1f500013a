package cli

const rootLong = `smolvm runs disposable virtual machines (VMs) for code that you don't trust.
Each VM has a kernel of its own; nothing in it can reach the files of this host.

  smolvm run -- uname -a              run one command in a VM of its own
  echo hi | smolvm run -- cat         the same, in a pipe
  smolvm run                          a shell in a VM of its own

  smolvm create --name web            make a VM that stays
  smolvm start web
  smolvm exec web -- uname -a
  smolvm rm web`

// usageTemplate is cobra's, without the line for the command itself where it only has
// subcommands, and with what holds for all commands at the end of the root's.
const usageTemplate = `Usage:
  {{if .HasAvailableSubCommands}}{{.CommandPath}} COMMAND{{else}}{{.UseLine}}{{end}}
{{- if .Aliases}}

Also known as:
  {{range $i, $alias := .Aliases}}{{if $i}}, {{end}}{{$alias}}{{end}}{{end}}
{{- if .HasExample}}

Examples:
{{.Example}}{{end}}
{{- if .HasAvailableSubCommands}}{{$commands := .Commands}}
{{- if .Groups}}{{range $group := .Groups}}

{{.Title}}{{range $commands}}{{if (and (eq .GroupID $group.ID) .IsAvailableCommand)}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}
{{- else}}

Commands:{{range $commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}{{end}}{{end}}
{{- if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}
{{- if .HasAvailableInheritedFlags}}

Flags of all commands:
{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}{{end}}
{{- if .HasAvailableSubCommands}}

"{{.CommandPath}} COMMAND --help" tells more about a command.{{end}}
{{- if not .HasParent}}

Exit status:
  0 success, 1 error, 2 wrong usage. run, exec and shell exit with the status of
  the command in the VM, or with 128 and the number of the signal that ended it.

Environment:
  SMOLVM_DATA_DIR   data directory, unless --data-dir is given
  SMOLVM_BACKEND    backend, unless --backend is given
  NO_COLOR          no colours{{end}}
`
