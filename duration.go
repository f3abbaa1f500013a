package smolvm

import (
	"bytes"
	"encoding/json"
	"math"
	"time"
)

// milliseconds is a duration as all JSON of this module has it: a number of milliseconds
// with at most three decimals, in a field whose name ends in "_ms".
type milliseconds time.Duration

// MarshalJSON implements [json.Marshaler].
func (d milliseconds) MarshalJSON() ([]byte, error) {
	return json.Marshal(float64(time.Duration(d).Round(time.Microsecond)) / float64(time.Millisecond))
}

// UnmarshalJSON implements [json.Unmarshaler].
func (d *milliseconds) UnmarshalJSON(text []byte) error {
	var ms float64
	if err := json.Unmarshal(text, &ms); err != nil {
		return err
	}
	*d = milliseconds(math.Round(ms * float64(time.Millisecond)))
	return nil
}

// encode encodes a value as it is: whether characters of HTML are escaped is for the encoder
// to decide that calls the method which calls this.
func encode(value any) ([]byte, error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(value)
	return text.Bytes(), err
}

// Each type below has the fields of a public one and none of its methods, so that it is
// encoded field by field; the field for the duration stands beside it.
type (
	plainConfig   VMConfig
	plainEvent    Event
	plainFlow     FlowRecord
	plainForked   Forked
	plainHealth   Healthcheck
	plainPhase    Phase
	plainReport   StartReport
	plainSnapshot Snapshot
	plainUsage    Usage
)

type configJSON struct {
	plainConfig
	TTL milliseconds `json:"ttl_ms,omitempty"`
}

// MarshalJSON implements [json.Marshaler]; TTL is "ttl_ms".
func (c VMConfig) MarshalJSON() ([]byte, error) {
	return encode(configJSON{plainConfig(c), milliseconds(c.TTL)})
}

// UnmarshalJSON implements [json.Unmarshaler]. It also reads "ttl_ns", which earlier
// versions have written to databases and snapshots.
func (c *VMConfig) UnmarshalJSON(text []byte) error {
	j := struct {
		configJSON
		TTLNanoseconds time.Duration `json:"ttl_ns"`
	}{configJSON: configJSON{plainConfig(*c), milliseconds(c.TTL)}}
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*c = VMConfig(j.plainConfig)
	if c.TTL = time.Duration(j.TTL); c.TTL == 0 {
		c.TTL = j.TTLNanoseconds
	}
	return nil
}

type eventJSON struct {
	plainEvent
	Duration milliseconds `json:"duration_ms"`
}

// MarshalJSON implements [json.Marshaler]; Duration is "duration_ms".
func (e Event) MarshalJSON() ([]byte, error) {
	return encode(eventJSON{plainEvent(e), milliseconds(e.Duration)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (e *Event) UnmarshalJSON(text []byte) error {
	var j eventJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*e = Event(j.plainEvent)
	e.Duration = time.Duration(j.Duration)
	return nil
}

type flowJSON struct {
	plainFlow
	Duration milliseconds `json:"duration_ms,omitempty"`
}

// MarshalJSON implements [json.Marshaler]; Duration is "duration_ms".
func (r FlowRecord) MarshalJSON() ([]byte, error) {
	return encode(flowJSON{plainFlow(r), milliseconds(r.Duration)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (r *FlowRecord) UnmarshalJSON(text []byte) error {
	var j flowJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*r = FlowRecord(j.plainFlow)
	r.Duration = time.Duration(j.Duration)
	return nil
}

type snapshotJSON struct {
	plainSnapshot
	Pause milliseconds `json:"pause_ms"`
}

// MarshalJSON implements [json.Marshaler]; Pause is "pause_ms".
func (s Snapshot) MarshalJSON() ([]byte, error) {
	return encode(snapshotJSON{plainSnapshot(s), milliseconds(s.Pause)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (s *Snapshot) UnmarshalJSON(text []byte) error {
	var j snapshotJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*s = Snapshot(j.plainSnapshot)
	s.Pause = time.Duration(j.Pause)
	return nil
}

type forkedJSON struct {
	plainForked
	Pause milliseconds `json:"pause_ms"`
}

// MarshalJSON implements [json.Marshaler]; Pause is "pause_ms".
func (f Forked) MarshalJSON() ([]byte, error) {
	return encode(forkedJSON{plainForked(f), milliseconds(f.Pause)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (f *Forked) UnmarshalJSON(text []byte) error {
	var j forkedJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*f = Forked(j.plainForked)
	f.Pause = time.Duration(j.Pause)
	return nil
}

type phaseJSON struct {
	plainPhase
	Duration milliseconds `json:"duration_ms"`
}

// MarshalJSON implements [json.Marshaler]; Duration is "duration_ms".
func (p Phase) MarshalJSON() ([]byte, error) {
	return encode(phaseJSON{plainPhase(p), milliseconds(p.Duration)})
}

// UnmarshalJSON implements [json.Unmarshaler]. It also reads "ms", which earlier versions
// have written to databases.
func (p *Phase) UnmarshalJSON(text []byte) error {
	var j struct {
		phaseJSON
		Old milliseconds `json:"ms"`
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*p = Phase(j.plainPhase)
	p.Duration = time.Duration(j.Duration + j.Old)
	return nil
}

// oldBoot is what earlier versions have called [StartBoot].
const oldBoot = "cold boot"

// UnmarshalJSON implements [json.Unmarshaler]. It also reads reports that earlier versions
// have written to databases: their "rung" is the method, and "cold boot" is [StartBoot].
func (r *StartReport) UnmarshalJSON(text []byte) error {
	var j struct {
		plainReport
		Rung StartMethod `json:"rung"`
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*r = StartReport(j.plainReport)
	if r.Method == "" {
		r.Method = j.Rung
	}
	if r.Method == oldBoot {
		r.Method = StartBoot
	}
	return nil
}

type usageJSON struct {
	CPUTime milliseconds `json:"cpu_time_ms"`
	plainUsage
}

// MarshalJSON implements [json.Marshaler]; CPUTime is "cpu_time_ms".
func (u Usage) MarshalJSON() ([]byte, error) {
	return encode(usageJSON{milliseconds(u.CPUTime), plainUsage(u)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (u *Usage) UnmarshalJSON(text []byte) error {
	var j usageJSON
	if err := json.Unmarshal(text, &j); err != nil {
		return err
	}
	*u = Usage(j.plainUsage)
	u.CPUTime = time.Duration(j.CPUTime)
	return nil
}

type healthJSON struct {
	plainHealth
	Interval      milliseconds `json:"interval_ms"`
	Timeout       milliseconds `json:"timeout_ms"`
	StartPeriod   milliseconds `json:"start_period_ms"`
	StartInterval milliseconds `json:"start_interval_ms"`
}

// MarshalJSON implements [json.Marshaler]; durations are in fields that end in "_ms".
func (h Healthcheck) MarshalJSON() ([]byte, error) {
	return encode(healthJSON{plainHealth(h), milliseconds(h.Interval), milliseconds(h.Timeout), milliseconds(h.StartPeriod), milliseconds(h.StartInterval)})
}

// UnmarshalJSON implements [json.Unmarshaler].
func (h *Healthcheck) UnmarshalJSON(text []byte) error {
	var decoded healthJSON
	if err := json.Unmarshal(text, &decoded); err != nil {
		return err
	}
	*h = Healthcheck(decoded.plainHealth)
	h.Interval, h.Timeout = time.Duration(decoded.Interval), time.Duration(decoded.Timeout)
	h.StartPeriod, h.StartInterval = time.Duration(decoded.StartPeriod), time.Duration(decoded.StartInterval)
	return nil
}
