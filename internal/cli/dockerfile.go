package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/smolvm/smolvm"
)

// dockerfileFlags are the flags of `image build` that are for Dockerfiles.
type dockerfileFlags struct {
	options smolvm.DockerfileOptions
	egress  egressFlags
	// file is the Dockerfile's path, or - for the standard input.
	file, progress string
	output         imageOutput
	names          []string // of the flags
}

func (f *dockerfileFlags) register(cmd *cobra.Command) {
	before := flagNames(cmd)
	flags, options := cmd.Flags(), &f.options
	flags.StringArrayVarP(&options.Tags, "tag", "t", nil, "`NAME[:TAG]` of the image (repeatable)")
	flags.StringVarP(&f.file, "file", "f", "", "the Dockerfile in `FILE`, or - for stdin (default: Dockerfile in PATH)")
	flags.StringVar(&options.Target, "target", "", "build the `STAGE` of that name or number (default: the last)")
	flags.Func("build-arg", "value of an ARG: `NAME[=VALUE]`, by default the environment's (repeatable)", f.addArg)
	flags.Func("label", "label of the image: `NAME[=VALUE]` (repeatable)", f.addLabel)
	flags.Func("secret", "what RUN --mount=type=secret has: `id=ID[,src=FILE|,env=NAME]` (repeatable)", f.addSecret)
	flags.BoolVar(&options.NoCache, "no-cache", false, "do all steps again")
	flags.BoolVar(&options.Pull, "pull", false, "ask registries what the names of base images mean now")
	flags.StringVar(&options.Platform, "platform", "", "`OS/ARCH` of the image: this host's, or it is refused")
	flags.StringVar(&f.progress, "progress", "auto", "show the progress by `TYPE`: auto, or plain, with all that commands say")
	flags.FuncP("output", "o", "write the image too: `type=oci,dest=PATH[,tar=false]`, an archive, or without tar a directory; - is stdout", f.output.parse)
	machineFlags(cmd, &options.VM.VCPUs, &options.VM.MemoryMiB, " for RUN")
	networkFlag(cmd, &options.VM.Network)
	f.egress.register(cmd)
	complete(cmd, "progress", words("auto", "plain"))
	for _, name := range []string{"tag", "target", "build-arg", "label", "secret", "platform", "output"} {
		complete(cmd, name, words())
	}
	for name := range flagNames(cmd) {
		if !before[name] {
			f.names = append(f.names, name)
		}
	}
}

func (f *dockerfileFlags) addArg(text string) error {
	name, value, given := strings.Cut(text, "=")
	if name == "" {
		return errors.New("it has no name")
	}
	if !given {
		if value, given = os.LookupEnv(name); !given {
			return nil // as docker: an argument that is not set has its default
		}
	}
	if f.options.Args == nil {
		f.options.Args = map[string]string{}
	}
	f.options.Args[name] = value
	return nil
}

func (f *dockerfileFlags) addLabel(text string) error {
	name, value, _ := strings.Cut(text, "=")
	if name == "" {
		return errors.New("it has no name")
	}
	if f.options.Labels == nil {
		f.options.Labels = map[string]string{}
	}
	f.options.Labels[name] = value
	return nil
}

// maxSecretFile is how long the file of a secret may be, in bytes.
const maxSecretFile = 500 << 10

// addSecret reads a secret: id=ID,src=FILE, id=ID,env=NAME, or id=ID alone, for the variable of
// that name.
func (f *dockerfileFlags) addSecret(text string) error {
	fields := map[string]string{}
	for field := range strings.SplitSeq(text, ",") {
		name, value, ok := strings.Cut(field, "=")
		switch {
		case !ok:
			return fmt.Errorf("%q is not NAME=VALUE", field)
		case name == "source":
			name = "src"
		case name != "id" && name != "src" && name != "env" && name != "type":
			return fmt.Errorf("%q is none of id, src and env", name)
		}
		fields[name] = value
	}
	id, file, variable := fields["id"], fields["src"], fields["env"]
	switch {
	case id == "":
		return errors.New("it has no id")
	case file != "" && variable != "":
		return errors.New("it has a file and a variable")
	case fields["type"] == "env" && variable == "": // src is a variable then
		file, variable = "", file
	}
	value, err := readSecret(id, file, variable)
	if err != nil {
		return err
	}
	if f.options.Secrets == nil {
		f.options.Secrets = map[string][]byte{}
	}
	f.options.Secrets[id] = value
	return nil
}

func readSecret(id, file, variable string) ([]byte, error) {
	if file == "" {
		if variable == "" {
			variable = id
		}
		value, ok := os.LookupEnv(variable)
		if !ok {
			return nil, fmt.Errorf("there is no variable %s; give a file by src=FILE", variable)
		}
		return []byte(value), nil
	}
	opened, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = opened.Close() }()
	value, err := io.ReadAll(io.LimitReader(opened, maxSecretFile+1))
	if err == nil && len(value) > maxSecretFile {
		err = fmt.Errorf("%s is longer than %d bytes", file, maxSecretFile)
	}
	return value, err
}

// wanted reports whether a Dockerfile is to be built: a flag for one is given, or the argument is
// a path. Names of images have no slash.
func (f *dockerfileFlags) wanted(cmd *cobra.Command, args []string) bool {
	for _, name := range f.names {
		if cmd.Flags().Changed(name) {
			return true
		}
	}
	return len(args) > 0 && isContext(args[0])
}

func isContext(arg string) bool {
	return arg == "-" || arg == "." || arg == ".." || strings.Contains(arg, "/")
}

// resolve returns the options, given the argument. What is read from the standard input is read by
// the build.
func (f *dockerfileFlags) resolve(a *app, args []string) (options smolvm.DockerfileOptions, err error) {
	options = f.options
	options.VM.Backend = a.backend
	if options.VM.Egress, err = f.egress.policy(); err != nil {
		return options, err
	}
	if epoch, ok := os.LookupEnv("SOURCE_DATE_EPOCH"); ok {
		if _, given := options.Args["SOURCE_DATE_EPOCH"]; !given {
			if err := f.addArg("SOURCE_DATE_EPOCH=" + epoch); err != nil {
				return options, err
			}
			options.Args = f.options.Args
		}
	}
	switch {
	case len(args) == 0:
		return options, withHint(usagef("there is no context"), "give the directory whose files are copied, such as `.`, or - for an archive or a Dockerfile on stdin")
	case strings.Contains(args[0], "://") || strings.HasPrefix(args[0], "git@"):
		return options, withHint(usagef("%q is no directory", args[0]), "clone it, and give the directory; or pipe an archive in, with - for the context")
	case args[0] == "-" && f.file == "-":
		return options, usagef("the context and the Dockerfile can't both be on stdin")
	case args[0] == "-":
		options.ContextArchive = a.Stdin
	default:
		options.Context = args[0]
	}
	options.Dockerfile = f.file
	if f.file == "-" {
		const most = 1 << 20
		if options.DockerfileText, err = io.ReadAll(io.LimitReader(a.Stdin, most+1)); err != nil {
			return options, fmt.Errorf("read Dockerfile: %w", err)
		}
		options.Dockerfile = ""
	}
	return options, nil
}

// buildDockerfile builds an image from a Dockerfile, and prints its digest.
func (a *app) buildDockerfile(cmd *cobra.Command, f *dockerfileFlags, args []string, quiet bool) error {
	options, err := f.resolve(a, args)
	if err != nil {
		return err
	}
	if f.progress != "auto" && f.progress != "plain" {
		return usagef("--progress %q: it is auto or plain", f.progress)
	}
	shown := newBuildProgress(a.Stderr, f.progress == "plain")
	if !quiet {
		options.Progress = shown.update
	}
	return a.withManager(cmd.Context(), func(m smolvm.Service) error {
		file, err := f.output.open(a, &options.Export)
		if err != nil {
			return err
		}
		image, err := m.BuildDockerfile(cmd.Context(), options)
		shown.finish()
		if err := closeWritten(file, err); err != nil {
			a.showLines(options, err)
			return err
		}
		if f.output.dest == "-" {
			return nil // where the archive is
		}
		return a.printImage(image)
	})
}

// imageOutput is where an image is written to that is built; the zero value is nowhere.
type imageOutput struct {
	dest  string
	isDir bool
}

// parse reads type=oci,dest=PATH[,tar=false]. Archives are such that docker load reads them too.
func (o *imageOutput) parse(text string) error {
	*o = imageOutput{}
	kind := ""
	for field := range strings.SplitSeq(text, ",") {
		switch name, value, _ := strings.Cut(field, "="); {
		case name == "type":
			kind = value
		case name == "dest":
			o.dest = value
		case name == "tar" && (value == "true" || value == "false"):
			o.isDir = value == "false"
		default:
			return fmt.Errorf("%q is none of type=oci, dest=PATH and tar=false", field)
		}
	}
	switch {
	case kind != "oci" && kind != "docker":
		return fmt.Errorf("its type is %q, and can be oci or docker", kind)
	case o.dest == "" || o.isDir && o.dest == "-":
		return errors.New("it has no dest=PATH")
	}
	return nil
}

// open has the image be written. The file is nil if there is none.
func (o *imageOutput) open(a *app, to *smolvm.ExportOptions) (*os.File, error) {
	switch {
	case o.dest == "":
	case o.isDir:
		to.Dir = o.dest
	case o.dest == "-":
		if _, isTerminal := terminal(a.Stdout); isTerminal {
			return nil, usagef("an archive is not for a terminal; give a file, or a pipe")
		}
		to.Archive = a.Program.Stdout
	default:
		file, err := os.Create(o.dest)
		if err != nil {
			return nil, err
		}
		to.Archive = file
		return file, nil
	}
	return nil, nil
}

// showLines shows the lines of a Dockerfile that an error is about, as docker does.
func (a *app) showLines(options smolvm.DockerfileOptions, err error) {
	var at *smolvm.DockerfileError
	if !errors.As(err, &at) || at.Line == 0 || a.json {
		return
	}
	text := options.DockerfileText
	if text == nil {
		if options.Context == "" {
			return
		}
		if text, err = os.ReadFile(at.File); err != nil {
			return // it is gone, and the error says the line
		}
	}
	lines := bytes.Split(text, []byte("\n"))
	const around = 2
	for i := max(at.Line-around, 1); i <= min(at.Line+around, len(lines)); i++ {
		mark := "   "
		if i == at.Line {
			mark = ">>>"
		}
		a.errorf("%4d | %s %s", i, mark, strings.TrimRight(string(lines[i-1]), "\r"))
	}
}
