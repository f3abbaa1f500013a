package api_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/smolvm/smolvm/internal/vmm/firecracker/api"
	"github.com/smolvm/smolvm/internal/vmm/firecracker/firecrackerfake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func errorAs[E error](err error) (E, bool) { return errors.AsType[E](err) }

// Whatever Firecracker does at a call, the call ends, and says which it was and what went
// wrong.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, one := range requests() {
		for fault, want := range map[firecrackerfake.Fault]string{
			firecrackerfake.FaultLate:   "",
			firecrackerfake.FaultRefuse: "Firecracker refuses " + one.call + ": " + firecrackerfake.Refusal,
			firecrackerfake.FaultCut:    "can't be read: unexpected end of JSON",
			firecrackerfake.FaultDie:    "the connection to Firecracker is broken: EOF",
			firecrackerfake.FaultHang:   "no answer from Firecracker",
			firecrackerfake.FaultLong:   "is longer than",
		} {
			if fault == firecrackerfake.FaultCut && !strings.HasPrefix(one.call, "GET ") {
				continue // it is answered by no JSON
			}
			t.Run(one.call+" "+string(fault), func(t *testing.T) {
				t.Parallel()
				opts := firecrackerfake.Options{Version: "1.17.0"}
				if one.call != "GET /version" { // which is asked for first
					opts.Call, opts.Fault = one.call, fault
				}
				fake := firecrackerfake.New(opts)
				client := serve(t, fake, fake)
				if _, err := client.Version(t.Context()); err != nil {
					t.Fatal(err)
				}
				if one.call == "GET /version" {
					fake = firecrackerfake.New(firecrackerfake.Options{Call: one.call, Fault: fault})
					client = serve(t, fake, fake)
				}
				ctx := t.Context()
				if fault == firecrackerfake.FaultHang {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
					defer cancel()
				}
				err := one.send(ctx, client)
				switch {
				case want == "" && err == nil:
				case err == nil || want == "" || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), one.call):
					t.Errorf("error is %v, want %q", err, want)
				}
				if fault == firecrackerfake.FaultHang && !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("error is %v, want the deadline's", err)
				}
			})
		}
	}
}

// A feature is sent to a release that has it, and refused in words for one that has not.
func TestFeatures(t *testing.T) {
	t.Parallel()
	drives := 1
	for name, test := range map[string]struct {
		last, first string // releases without it, and with it
		send        func(context.Context, *api.Client) error
	}{
		"part of the machine": {"1.10.1", "1.11.0", func(ctx context.Context, c *api.Client) error {
			return c.UpdateMachine(ctx, api.MachineConfigUpdate{VCPUs: &drives})
		}},
		"another TAP": {"1.11.0", "1.12.0", func(ctx context.Context, c *api.Client) error {
			return c.LoadSnapshot(ctx, api.LoadParams{Networks: []api.NetworkOverride{{ID: "net", TAP: "t"}}})
		}},
		"dirty pages": {"1.12.1", "1.13.0", func(ctx context.Context, c *api.Client) error {
			return c.LoadSnapshot(ctx, api.LoadParams{TrackDirty: true})
		}},
		"serial": {"1.13.2", "1.14.0", func(ctx context.Context, c *api.Client) error {
			return c.SetSerial(ctx, api.SerialDevice{Path: "console"})
		}},
		"free pages": {"1.13.2", "1.14.0", func(ctx context.Context, c *api.Client) error {
			return c.SetBalloon(ctx, api.Balloon{FreePageHinting: true})
		}},
		"MTU": {"1.15.1", "1.16.0", func(ctx context.Context, c *api.Client) error {
			return c.SetNetworkInterface(ctx, api.NetworkInterface{ID: "net", MTU: 1400})
		}},
		"another vsock": {"1.15.1", "1.16.0", func(ctx context.Context, c *api.Client) error {
			return c.LoadSnapshot(ctx, api.LoadParams{Vsock: &api.VsockPath{Path: "v"}})
		}},
		"clock": {"1.15.1", "1.16.0", func(ctx context.Context, c *api.Client) error {
			return c.LoadSnapshot(ctx, api.LoadParams{ClockRealtime: true})
		}},
		"serial's limit": {"1.15.1", "1.16.0", func(ctx context.Context, c *api.Client) error {
			return c.SetSerial(ctx, api.SerialDevice{RateLimiter: &api.TokenBucket{}})
		}},
		"huge pages": {"1.16.1", "1.17.0-dev", func(ctx context.Context, c *api.Client) error {
			return c.SetMachine(ctx, api.MachineConfig{HugePages: api.HugePagesTransparent})
		}},
		"huge pages at load": {"1.16.1", "1.17.0", func(ctx context.Context, c *api.Client) error {
			return c.LoadSnapshot(ctx, api.LoadParams{HugePages: api.HugePagesSnapshot})
		}},
		"labels": {"1.16.1", "1.17.0", func(ctx context.Context, c *api.Client) error {
			return c.SetMetrics(ctx, api.Metrics{EmitID: true})
		}},
	} {
		for _, version := range []string{test.last, test.first} {
			fake := firecrackerfake.New(firecrackerfake.Options{Version: version})
			client := serve(t, fake, fake)
			if _, err := client.Version(t.Context()); err != nil {
				t.Fatal(err)
			}
			err := test.send(t.Context(), client)
			old, isOld := errorAs[*api.TooOldError](err)
			if isOld != (version == test.last) || len(fake.Requests()) != map[bool]int{true: 1, false: 2}[isOld] {
				t.Errorf("%s to %s: %v; it has received %+v", name, version, err, fake.Requests())
			}
			if isOld && !strings.Contains(old.Error(), "came with "+strings.TrimSuffix(test.first, "-dev")) {
				t.Errorf("%s to %s: %v", name, version, old)
			}
		}
	}
}

func TestParseVersion(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"1.12.1": "1.12.1", "v1.7.0": "1.7.0", "1.17.0-dev": "1.17.0", " 1.2.3\n": "1.2.3",
		"": "", "1.12": "", "1.x.3": "", "1.2.3.4": "", "-1.2.3": "", "1.2.70000": "",
	} {
		got, err := api.ParseVersion(text)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("ParseVersion(%q) = %v, %v", text, got, err)
		}
	}
	order := []api.Version{{1, 7, 0}, {1, 7, 1}, {1, 12, 0}, {2, 0, 0}}
	for i, a := range order {
		for j, b := range order {
			if a.Before(b) != (i < j) {
				t.Errorf("%v before %v: %v", a, b, a.Before(b))
			}
		}
	}
}

// The releases whose fault is known are those between the change that made it and the one
// that mended it.
func TestPauseBreaksVsock(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"1.12.1": false, "1.15.1": false, "1.16.0": true, "1.16.1": true, "1.17.0-dev": false} {
		v, err := api.ParseVersion(text)
		if err != nil || api.PauseBreaksVsock(v) != want {
			t.Errorf("%s: %v, %v", text, api.PauseBreaksVsock(v), err)
		}
	}
}
