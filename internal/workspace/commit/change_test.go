package commit

import (
	"context"
	"reflect"
	"strings"
	"testing"

	"github.com/smolvm/smolvm"
)

func TestChanges(t *testing.T) {
	var config Config
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env, config.Config.OnBuild, config.Config.WorkingDir = []string{"A=0", "B=2"}, []string{"RUN false"}, "/old"
	config.Config.Cmd, config.Config.Labels = []string{"old"}, map[string]string{"kept": "1"}
	err := Changes([]string{
		"ENV A=1 C=$B", `ENTRYPOINT ["/app", "-x"]`, "cmd serve --all", "WORKDIR sub", "USER 7:8", `LABEL a="b c"`, "EXPOSE 80 53/udp", "VOLUME /data",
		"STOPSIGNAL SIGINT", "ONBUILD RUN true", "HEALTHCHECK --retries=3 CMD curl localhost",
	}, "amd64")(context.Background(), &config)
	if err != nil {
		t.Fatal(err)
	}
	got := config.Config.ImageConfig
	for name, test := range map[string]struct{ got, want any }{
		"env":        {got.Env, []string{"A=1", "B=2", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "C=2"}}, // as builds have it
		"entrypoint": {got.Entrypoint, []string{"/app", "-x"}},
		"cmd":        {got.Cmd, []string{"/bin/sh", "-c", "serve --all"}},
		"dir":        {got.WorkingDir, "/old/sub"},
		"user":       {got.User, "7:8"},
		"labels":     {got.Labels, map[string]string{"kept": "1", "a": "b c"}},
		"ports":      {got.ExposedPorts, map[string]struct{}{"80/tcp": {}, "53/udp": {}}},
		"volumes":    {got.Volumes, map[string]struct{}{"/data": {}}},
		"signal":     {got.StopSignal, "SIGINT"},
		"on build":   {config.Config.OnBuild, []string{"RUN false", "RUN true"}},
		"health":     {config.Config.Healthcheck.Test, []string{"CMD-SHELL", "curl localhost"}},
	} {
		if !reflect.DeepEqual(test.got, test.want) {
			t.Errorf("%s is %q, want %q", name, test.got, test.want)
		}
	}
}

func TestChangesRefused(t *testing.T) {
	for instruction, want := range map[string]string{
		"RUN make":          "no instruction that changes",
		"FROM other":        "no instruction that changes",
		"COPY a b":          "no instruction that changes",
		"":                  "no instruction that changes",
		"ENV A=1\nRUN make": "no instruction that changes",
		"ENV":               "ENV",
		"EXPOSE many":       "many",
		"ONBUILD FROM x":    "FROM",
	} {
		var config Config
		err := Changes([]string{instruction}, "amd64")(context.Background(), &config)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "line") {
			t.Errorf("%q: %v", instruction, err)
		}
		if want == "no instruction that changes" && smolvm.HintOf(err) == "" {
			t.Errorf("%q: there is no hint", instruction)
		}
	}
}
