package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi2"
	"github.com/getkin/kin-openapi/openapi2conv"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"go.yaml.in/yaml/v3"

	"github.com/smolvm/smolvm/internal/stream"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/firecrackerfake"
)

// serve returns a client of a handler that serves on a unix socket, and asks for the version.
func serve(t *testing.T, server *firecrackerfake.Server, handler http.Handler) *api.Client {
	t.Helper()
	listener, err := stream.ListenUnix(filepath.Join(t.TempDir(), "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: handler} //nolint:gosec // of one test
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = web.Serve(listener)
	}()
	client := api.New(func(ctx context.Context) (net.Conn, error) { return stream.DialUnix(ctx, listener.Addr().String()) })
	t.Cleanup(func() {
		client.Close()
		server.Close()
		_ = web.Close()
		<-done
	})
	return client
}

// document is Firecracker's API document, in which an object has no more than its properties.
func document(t *testing.T) routers.Router {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "firecracker.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var parsed any
	if err := yaml.Unmarshal(text, &parsed); err != nil {
		t.Fatal(err)
	}
	asJSON, err := json.Marshal(strict(parsed))
	if err != nil {
		t.Fatal(err)
	}
	var v2 openapi2.T
	if err := json.Unmarshal(asJSON, &v2); err != nil {
		t.Fatal(err)
	}
	v3, err := openapi2conv.ToV3(&v2)
	if err != nil {
		t.Fatal(err)
	}
	v3.Servers = openapi3.Servers{{URL: "http://localhost"}}
	router, err := legacy.NewRouter(v3, openapi3.DisableExamplesValidation())
	if err != nil {
		t.Fatal(err)
	}
	return router
}

// strict forbids other properties than those that an object declares, makes keys strings, and
// drops what stands beside a reference, which no validator looks at.
func strict(node any) any {
	switch n := node.(type) {
	case map[string]any:
		if ref, ok := n["$ref"]; ok {
			return map[string]any{"$ref": ref}
		}
		for key, value := range n {
			n[key] = strict(value)
		}
		if _, has := n["additionalProperties"]; !has && n["type"] == "object" && n["properties"] != nil {
			n["additionalProperties"] = false
		}
	case map[any]any:
		out := map[string]any{}
		for key, value := range n {
			out[fmt.Sprint(key)] = value
		}
		return strict(out)
	case []any:
		for i, value := range n {
			n[i] = strict(value)
		}
	}
	return node
}

// checked validates requests by Firecracker's document, and answers by the fake.
func checked(t *testing.T, router routers.Router, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		again := func() io.ReadCloser { return io.NopCloser(bytes.NewReader(body)) }
		r.Body = again()
		r.URL.Scheme, r.URL.Host = "http", "localhost"
		route, params, err := router.FindRoute(r)
		if err == nil {
			err = openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route})
		}
		if err != nil {
			w.WriteHeader(http.StatusTeapot)
			_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": "by its document: " + err.Error()})
			return
		}
		r.Body = again()
		next.ServeHTTP(w, r)
	})
}

// request is one of each type, with all that it can say.
type request struct {
	call string
	send func(context.Context, *api.Client) error
}

func limiter() *api.RateLimiter {
	return &api.RateLimiter{Bandwidth: &api.TokenBucket{Size: 1, OneTimeBurst: 2, RefillTime: 3}, Ops: &api.TokenBucket{Size: 4, RefillTime: 5}}
}

func requests() []request {
	two, much, yes := 2, 256, true
	machine := api.MachineConfig{VCPUs: 2, MemoryMiB: 256, SMT: true, TrackDirtyPages: true, HugePages: api.HugePagesTransparent}
	load := api.LoadParams{
		State: "state", Memory: api.MemoryBackend{Type: api.BackendFile, Path: "memory"}, Resume: true, EnableDiff: true, TrackDirty: true,
		Networks: []api.NetworkOverride{{ID: "net", TAP: "tap1"}}, Vsock: &api.VsockPath{Path: "v.sock"}, ClockRealtime: true, HugePages: api.HugePagesSnapshot,
	}
	return []request{
		{"GET /", func(ctx context.Context, c *api.Client) error { _, err := c.Instance(ctx); return err }},
		{"GET /version", func(ctx context.Context, c *api.Client) error { _, err := c.Version(ctx); return err }},
		{"GET /machine-config", func(ctx context.Context, c *api.Client) error { _, err := c.Machine(ctx); return err }},
		{"PUT /machine-config", func(ctx context.Context, c *api.Client) error { return c.SetMachine(ctx, machine) }},
		{"PATCH /machine-config", func(ctx context.Context, c *api.Client) error {
			return c.UpdateMachine(ctx, api.MachineConfigUpdate{VCPUs: &two, MemoryMiB: &much, SMT: &yes, TrackDirtyPages: &yes, HugePages: api.HugePages2M})
		}},
		{"PUT /boot-source", func(ctx context.Context, c *api.Client) error {
			return c.SetBootSource(ctx, api.BootSource{Kernel: "kernel", Initrd: "initrd", BootArgs: "console=ttyS0"})
		}},
		{"PUT /drives/drive0", func(ctx context.Context, c *api.Client) error {
			return c.SetDrive(ctx, api.Drive{
				ID: "drive0", Path: "drive0", Root: true, PartUUID: "0eaa91a0-01", ReadOnly: true,
				CacheType: api.CacheWriteback, IOEngine: api.EngineAsync, RateLimiter: limiter(),
			})
		}},
		{"PATCH /drives/drive0", func(ctx context.Context, c *api.Client) error {
			return c.UpdateDrive(ctx, api.DriveUpdate{ID: "drive0", Path: "other", RateLimiter: limiter()})
		}},
		{"PUT /network-interfaces/net", func(ctx context.Context, c *api.Client) error {
			return c.SetNetworkInterface(ctx, api.NetworkInterface{ID: "net", TAP: "tap0", MAC: "02:00:00:00:00:02", MTU: 1400, RXLimiter: limiter(), TXLimiter: limiter()})
		}},
		{"PATCH /network-interfaces/net", func(ctx context.Context, c *api.Client) error {
			return c.UpdateNetworkInterface(ctx, api.NetworkInterfaceUpdate{ID: "net", RXLimiter: limiter(), TXLimiter: limiter()})
		}},
		{"PUT /vsock", func(ctx context.Context, c *api.Client) error {
			return c.SetVsock(ctx, api.Vsock{GuestCID: 3, Path: "vsock.sock"})
		}},
		{"PUT /logger", func(ctx context.Context, c *api.Client) error {
			return c.SetLogger(ctx, api.Logger{Path: "log", Level: "Debug", ShowLevel: true, ShowOrigin: true, Module: "api_server"})
		}},
		{"PUT /metrics", func(ctx context.Context, c *api.Client) error {
			return c.SetMetrics(ctx, api.Metrics{Path: "metrics", EmitID: true, Properties: map[string]string{"vm": "a"}})
		}},
		{"PUT /entropy", func(ctx context.Context, c *api.Client) error {
			return c.SetEntropy(ctx, api.Entropy{RateLimiter: limiter()})
		}},
		{"PUT /balloon", func(ctx context.Context, c *api.Client) error {
			return c.SetBalloon(ctx, api.Balloon{AmountMiB: 1, DeflateOnOOM: true, StatsInterval: 1, FreePageHinting: true, FreePageReporting: true})
		}},
		{"PATCH /balloon", func(ctx context.Context, c *api.Client) error {
			return c.UpdateBalloon(ctx, api.BalloonUpdate{AmountMiB: 0})
		}},
		{"PUT /serial", func(ctx context.Context, c *api.Client) error {
			return c.SetSerial(ctx, api.SerialDevice{Path: "console", RateLimiter: &api.TokenBucket{Size: 1, RefillTime: 1}})
		}},
		{"PUT /actions", func(ctx context.Context, c *api.Client) error { return c.Do(ctx, api.SendCtrlAltDel) }},
		{"PUT /actions", func(ctx context.Context, c *api.Client) error { return c.Do(ctx, api.FlushMetrics) }},
		{"PUT /snapshot/load", func(ctx context.Context, c *api.Client) error {
			err := c.LoadSnapshot(ctx, load)
			if fault, ok := errorAs[*api.Fault](err); ok && strings.Contains(fault.Message, "restore from snapshot") {
				return nil // there is none: it got as far as that
			}
			return err
		}},
		{"PUT /actions", func(ctx context.Context, c *api.Client) error { return c.Do(ctx, api.InstanceStart) }},
		{"PATCH /vm", func(ctx context.Context, c *api.Client) error { return c.SetState(ctx, api.Paused) }},
		{"PATCH /vm", func(ctx context.Context, c *api.Client) error { return c.SetState(ctx, api.Resumed) }},
		{"PUT /snapshot/create", func(ctx context.Context, c *api.Client) error {
			err := c.CreateSnapshot(ctx, api.CreateParams{Memory: "memory", State: "state", Type: api.SnapshotDiff})
			if fault, ok := errorAs[*api.Fault](err); ok && strings.Contains(fault.Message, "running microVM") {
				return nil
			}
			return err
		}},
	}
}

// Every type of request is as Firecracker's own document has it, with all that it can say.
func TestRequestsAreOfTheDocument(t *testing.T) {
	t.Parallel()
	fake := firecrackerfake.New(firecrackerfake.Options{Version: "1.17.0-dev"})
	client := serve(t, fake, checked(t, document(t), fake))
	if _, err := client.Version(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, one := range requests() {
		before := len(fake.Requests())
		if err := one.send(t.Context(), client); err != nil {
			t.Errorf("%s: %v", one.call, err)
		}
		sent := fake.Requests()[before:]
		if len(sent) != 1 || sent[0].Call != one.call {
			t.Errorf("%s: %+v was sent", one.call, sent)
		}
	}
}

// What the document does not have is found out by the check.
func TestCheckFindsWrongRequests(t *testing.T) {
	t.Parallel()
	fake := firecrackerfake.New(firecrackerfake.Options{})
	client := serve(t, fake, checked(t, document(t), fake))
	for name, send := range map[string]func(context.Context) error{
		"a cache that is none":   func(ctx context.Context) error { return client.SetDrive(ctx, api.Drive{ID: "a", CacheType: "Fast"}) },
		"an action that is none": func(ctx context.Context) error { return client.Do(ctx, "Explode") },
		"too many CPUs": func(ctx context.Context) error {
			return client.SetMachine(ctx, api.MachineConfig{VCPUs: 33, MemoryMiB: 1})
		},
	} {
		if err := send(t.Context()); err == nil || !strings.Contains(err.Error(), "by its document") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
