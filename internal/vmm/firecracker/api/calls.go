package api

import (
	"context"
	"net/http"
	"net/url"
)

// Instance returns what Firecracker says of itself.
func (c *Client) Instance(ctx context.Context) (InstanceInfo, error) {
	var info InstanceInfo
	err := c.get(ctx, "/", &info)
	return info, err
}

// SetMachine sets the machine of a guest that was not started yet.
func (c *Client) SetMachine(ctx context.Context, m MachineConfig) error {
	if err := c.needs(map[Feature]bool{TransparentHugePages: m.HugePages == HugePagesTransparent}); err != nil {
		return err
	}
	return c.put(ctx, "/machine-config", m)
}

// UpdateMachine changes parts of it.
func (c *Client) UpdateMachine(ctx context.Context, m MachineConfigUpdate) error {
	err := c.needs(map[Feature]bool{
		PartialMachineConfig: m.MemoryMiB == nil || m.TrackDirtyPages == nil,
		TransparentHugePages: m.HugePages == HugePagesTransparent,
	})
	if err != nil {
		return err
	}
	return c.patch(ctx, "/machine-config", m)
}

// Machine returns the machine.
func (c *Client) Machine(ctx context.Context) (MachineConfig, error) {
	var m MachineConfig
	err := c.get(ctx, "/machine-config", &m)
	return m, err
}

// SetBootSource sets what the guest boots.
func (c *Client) SetBootSource(ctx context.Context, b BootSource) error {
	return c.put(ctx, "/boot-source", b)
}

// SetDrive adds a drive, or replaces the one with its id, before the guest is started.
func (c *Client) SetDrive(ctx context.Context, d Drive) error {
	return c.put(ctx, "/drives/"+url.PathEscape(d.ID), d)
}

// UpdateDrive changes a drive of a guest that runs or is paused.
func (c *Client) UpdateDrive(ctx context.Context, d DriveUpdate) error {
	return c.patch(ctx, "/drives/"+url.PathEscape(d.ID), d)
}

// SetNetworkInterface adds a network interface, or replaces the one with its id, before the
// guest is started.
func (c *Client) SetNetworkInterface(ctx context.Context, n NetworkInterface) error {
	if err := c.needs(map[Feature]bool{MTU: n.MTU != 0}); err != nil {
		return err
	}
	return c.put(ctx, "/network-interfaces/"+url.PathEscape(n.ID), n)
}

// UpdateNetworkInterface changes the limits of a network interface of a guest that runs.
func (c *Client) UpdateNetworkInterface(ctx context.Context, n NetworkInterfaceUpdate) error {
	return c.patch(ctx, "/network-interfaces/"+url.PathEscape(n.ID), n)
}

// SetVsock gives the guest a vsock device.
func (c *Client) SetVsock(ctx context.Context, v Vsock) error { return c.put(ctx, "/vsock", v) }

// SetLogger sets where Firecracker's log goes.
func (c *Client) SetLogger(ctx context.Context, l Logger) error { return c.put(ctx, "/logger", l) }

// SetMetrics sets where Firecracker's metrics go.
func (c *Client) SetMetrics(ctx context.Context, m Metrics) error {
	if err := c.needs(map[Feature]bool{MetricsLabels: m.EmitID || len(m.Properties) > 0}); err != nil {
		return err
	}
	return c.put(ctx, "/metrics", m)
}

// SetEntropy gives the guest a random number device.
func (c *Client) SetEntropy(ctx context.Context, e Entropy) error { return c.put(ctx, "/entropy", e) }

// SetBalloon gives the guest a balloon.
func (c *Client) SetBalloon(ctx context.Context, b Balloon) error {
	if err := c.needs(map[Feature]bool{FreePages: b.FreePageHinting || b.FreePageReporting}); err != nil {
		return err
	}
	return c.put(ctx, "/balloon", b)
}

// UpdateBalloon changes the size of a running guest's balloon.
func (c *Client) UpdateBalloon(ctx context.Context, b BalloonUpdate) error {
	return c.patch(ctx, "/balloon", b)
}

// SetSerial sets where the serial console goes.
func (c *Client) SetSerial(ctx context.Context, s SerialDevice) error {
	if err := c.needs(map[Feature]bool{Serial: true, SerialLimit: s.RateLimiter != nil}); err != nil {
		return err
	}
	return c.put(ctx, "/serial", s)
}

// Do has Firecracker do something at once.
func (c *Client) Do(ctx context.Context, action Action) error {
	return c.put(ctx, "/actions", map[string]Action{"action_type": action})
}

// SetState pauses the guest or has it go on, and returns when its CPUs have stopped or run.
func (c *Client) SetState(ctx context.Context, state VMState) error {
	return c.patch(ctx, "/vm", map[string]VMState{"state": state})
}

// CreateSnapshot saves a guest, which is paused. A context that is done does not keep
// Firecracker from going on with it.
func (c *Client) CreateSnapshot(ctx context.Context, p CreateParams) error {
	return c.do(ctx, http.MethodPut, "/snapshot/create", p, nil)
}

// LoadSnapshot restores a guest, in a Firecracker that was told of none yet.
func (c *Client) LoadSnapshot(ctx context.Context, p LoadParams) error {
	err := c.needs(map[Feature]bool{
		NetworkOverrides: len(p.Networks) > 0,
		TrackDirtyOnLoad: p.TrackDirty,
		VsockOverride:    p.Vsock != nil,
		ClockRealtime:    p.ClockRealtime,
		HugePagesOnLoad:  p.HugePages != "",
	})
	if err != nil {
		return err
	}
	return c.put(ctx, "/snapshot/load", p)
}
