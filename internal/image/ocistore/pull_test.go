package ocistore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/smolvm/smolvm"
	"github.com/smolvm/smolvm/internal/image/ociref"
)

// childEnv tells the test's program to pull an image: "STORE REF".
const childEnv = "OCISTORE_TEST_PULL"

func TestMain(m *testing.M) {
	dir, text, child := strings.Cut(os.Getenv(childEnv), " ")
	if !child {
		os.Exit(m.Run())
	}
	s, err := Open(dir, Limits{})
	if err == nil {
		var ref ociref.Ref
		if ref, err = ociref.Parse(text); err == nil {
			_, err = s.Pull(context.Background(), ref, PullOptions{Access: quick()})
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestPull(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 100_000, 10, 1_000_000)
	ref := registry.push(t, want, "some/image:v1")
	var mu sync.Mutex
	last := map[int]Progress{}
	image, err := s.Pull(t.Context(), ref, PullOptions{Access: quick(), Progress: func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		last[p.Number] = p
	}})
	must(t, err)
	checkWhole(t, s, image, want)
	for number := 1; number <= 3; number++ {
		if p := last[number]; p.Layers != 3 || p.Done != p.Total || p.Total != image.Layers[number-1].Size || p.Layer != image.Layers[number-1].Digest {
			t.Errorf("layer %d is at %+v", number, p)
		}
	}
	if left := files(t, s, partialDir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	found, err := s.Get(ref)
	must(t, err)
	checkWhole(t, s, found, want)
	if found.Name != ref.String() || found.AddedAt.IsZero() || found.Size != image.Size {
		t.Errorf("found %+v", found)
	}
	// What is there is not fetched again: only what the tag means now is asked.
	registry.asked("")
	_, err = pull(t, s, ref)
	must(t, err)
	if asked := registry.asked("/blobs/"); len(asked) > 0 {
		t.Errorf("pulled again, it asks for %q", asked)
	}
	// Another image shares the layers that are the same.
	more, err := mutate.AppendLayers(want, layerOf(t, 9, 1000))
	must(t, err)
	other := registry.push(t, more, "some/image:v2")
	image, err = pull(t, s, other)
	must(t, err)
	checkWhole(t, s, image, more)
	if asked := registry.asked("/blobs/"); len(asked) != 2 { // its configuration, and the layer
		t.Errorf("an image with one more layer asks for %q", asked)
	}
	list, err := s.List()
	must(t, err)
	if len(list) != 2 || list[0].Name != ref.String() || list[1].Name != other.String() {
		t.Errorf("list is %+v", list)
	}
}

func TestPullByDigest(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 1000)
	ref := registry.push(t, want, "image:v1")
	digest, err := want.Digest()
	must(t, err)
	registry.push(t, imageOf(t, 5, 1000), "image:v1") // the tag means another one now
	image, err := pull(t, s, ref.Pin(digest.String()))
	must(t, err)
	checkWhole(t, s, image, want)
	registry.does(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			_, _ = io.WriteString(w, `{"schemaVersion":2}`)
			return true
		}
		return false
	})
	var wrong *DigestError
	if _, err := pull(t, openStore(t, Limits{}), ref.Pin(digest.String())); !errors.As(err, &wrong) {
		t.Errorf("another manifest than asked for: %v", err)
	}
}

// indexOf returns an index of images for platforms.
func indexOf(t *testing.T, images map[string]v1.Image) v1.ImageIndex {
	t.Helper()
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, text := range []string{"unknown/unknown", "windows/amd64", "linux/arm64", "linux/arm/v7", "linux/arm/v6", "linux/amd64"} {
		if image, ok := images[text]; ok {
			platform, err := v1.ParsePlatform(text)
			must(t, err)
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: platform}})
		}
	}
	return index
}

func TestPullPlatform(t *testing.T) {
	registry := newServer(t)
	images := map[string]v1.Image{}
	for i, text := range []string{"unknown/unknown", "windows/amd64", "linux/arm64", "linux/arm/v7", "linux/arm/v6", "linux/amd64"} {
		parts := strings.Split(text, "/")
		images[text] = imageFor(t, parts[0], parts[1], uint64(100*i), 1000)
	}
	ref := registry.push(t, indexOf(t, images), "image")
	for asked, wanted := range map[string]string{
		"linux/arm64": "linux/arm64", "linux/arm64/v8": "", "linux/arm/v6": "linux/arm/v6", "linux/arm": "linux/arm/v7",
		"linux/riscv64": "", "linux/amd64": "linux/amd64", "nonsense": "", "windows/amd64": "windows/amd64", "a/b/c/d": "",
	} {
		s := openStore(t, Limits{})
		image, err := s.Pull(t.Context(), ref, PullOptions{Access: quick(), Platform: asked})
		if wanted == "" {
			if err == nil {
				t.Errorf("%s is %s", asked, image.Platform)
			}
			continue
		}
		must(t, err)
		checkWhole(t, s, image, images[wanted])
		if image.Index == "" {
			t.Errorf("%s has no digest of its index", asked)
		}
	}
	_, err := openStore(t, Limits{}).Pull(t.Context(), ref, PullOptions{Access: quick(), Platform: "linux/s390x"})
	if err == nil || !strings.Contains(err.Error(), "linux/arm64") || strings.Contains(err.Error(), "unknown/unknown") {
		t.Errorf("the platforms that there are: %v", err)
	}
	// One that is for another platform, and is in no index.
	lone := registry.push(t, imageFor(t, "linux", "mips", 1, 10), "lone")
	if _, err := pull(t, openStore(t, Limits{}), lone); err == nil || !strings.Contains(err.Error(), "mips") {
		t.Errorf("an image for another processor: %v", err)
	}
	if asked := registry.asked("/blobs/"); len(asked) == 0 {
		t.Error("nothing was asked for")
	}
}

// The misdeeds of a registry that a pull gets over.
func TestPullGetsOver(t *testing.T) {
	want := imageOf(t, 1, 300_000, 2_000_000)
	layers, err := want.Layers()
	must(t, err)
	large, err := layers[1].Digest()
	must(t, err)
	content := func() []byte {
		r, err := layers[1].Compressed()
		must(t, err)
		b, err := io.ReadAll(r)
		must(t, err)
		return b
	}()
	isLarge := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, large.String()) }
	cut := func(w http.ResponseWriter, part []byte, length int) {
		w.Header().Set("Content-Length", fmt.Sprint(length))
		_, _ = w.Write(part)
		panic(http.ErrAbortHandler)
	}
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials went elsewhere")
		}
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(content)))
	}))
	defer elsewhere.Close()
	for _, test := range []struct {
		name      string
		misbehave func(w http.ResponseWriter, r *http.Request, count int) bool
		ranges    int // how many requests for the rest are expected at least
	}{
		{"cuts again and again", func(w http.ResponseWriter, r *http.Request, count int) bool {
			var from int
			if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); !isLarge(r) || err == nil && from > 1_800_000 {
				return false
			}
			if from > 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(content)-1, len(content)))
				w.Header().Set("Content-Length", fmt.Sprint(len(content)-from))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(content[from : from+200_000])
				panic(http.ErrAbortHandler)
			}
			cut(w, content[:200_000], len(content))
			return true
		}, 8},
		{"knows no ranges", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if isLarge(r) && count == 1 {
				cut(w, content[:500_000], len(content))
			}
			if isLarge(r) {
				_, _ = w.Write(content)
				return true
			}
			return false
		}, 1},
		{"refuses the range", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if isLarge(r) && count == 1 {
				cut(w, content[:500_000], len(content))
			}
			if isLarge(r) && r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return true
			}
			return false
		}, 1},
		{"is busy", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if count > 3 {
				return false
			}
			w.Header().Set("Retry-After", "3")
			w.WriteHeader([]int{http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusBadGateway}[count-1])
			return true
		}, 0},
		{"sends blobs elsewhere", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if isLarge(r) {
				http.Redirect(w, r, elsewhere.URL+"/x", http.StatusTemporaryRedirect)
				return true
			}
			return false
		}, 0},
		{"sends too much", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if !isLarge(r) {
				return false
			}
			_, _ = w.Write(content)
			for r.Context().Err() == nil {
				if _, err := w.Write(content); err != nil {
					break
				}
			}
			return true
		}, 0},
		{"stalls", func(w http.ResponseWriter, r *http.Request, count int) bool {
			if !isLarge(r) || count > 1 {
				return false
			}
			_, _ = w.Write(content[:100_000])
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return true
		}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			registry, s := newServer(t), openStore(t, Limits{})
			ref := registry.push(t, want, "image")
			registry.does(test.misbehave)
			access := quick()
			access.Stall = 500 * time.Millisecond
			image, err := s.Pull(t.Context(), ref, PullOptions{Access: access})
			must(t, err)
			checkWhole(t, s, image, want)
			if ranges := registry.asked("bytes="); len(ranges) < test.ranges {
				t.Errorf("asked for the rest: %q", ranges)
			}
		})
	}
}

// The misdeeds that a pull fails of: at once, or in the end, and without a name for what it
// has not got.
func TestPullFails(t *testing.T) {
	want := imageOf(t, 1, 300_000, 2_000_000)
	onPath := func(part string, answer http.HandlerFunc) func(http.ResponseWriter, *http.Request, int) bool {
		return func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if strings.Contains(r.URL.Path, part) {
				answer(w, r)
				return true
			}
			return false
		}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	text := func(content string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, content) }
	}
	endless := func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("x", 100_000)); err != nil {
				return
			}
		}
	}
	const sum = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	manifest := func(config, layers string) http.HandlerFunc {
		return text(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":` + config + `,"layers":[` + layers + `]}`)
	}
	const config = `{"digest":"` + sum + `","size":10,"mediaType":"application/vnd.oci.image.config.v1+json"}`
	layer := func(size, kind string) string {
		return `{"digest":"` + sum + `","size":` + size + `,"mediaType":"application/vnd.` + kind + `"}`
	}
	for _, test := range []struct {
		name      string
		misbehave func(http.ResponseWriter, *http.Request, int) bool
		want      string
		is        error
	}{
		{"no such image", onPath("/manifests/", status(404)), "registry", smolvm.ErrImageNotFound},
		{"login needed", onPath("/manifests/", status(401)), "401", nil},
		{"forbidden", onPath("/blobs/", status(403)), "403", nil},
		{"always busy", onPath("/manifests/", status(429)), "429", nil},
		{"never there", onPath("/v2/", status(503)), "503", nil},
		{"other content", onPath("/blobs/", text(strings.Repeat("x", 3_000_000))), "digest", nil},
		{"always cut", onPath("/blobs/", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "300")
			panic(http.ErrAbortHandler)
		}), "", nil},
		{"redirects in circles", onPath("/blobs/", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String(), http.StatusFound)
		}), "one place to the next", nil},
		{"redirects to another scheme", onPath("/blobs/", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}), "", nil},
		{"redirects to plain http", onPath("/blobs/", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/x", http.StatusFound)
		}), "plain http", nil},
		{"another part than asked for", func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			w.Header().Set("Content-Range", "bytes 100-200/300")
			w.WriteHeader(http.StatusPartialContent)
			return true
		}, "another part", nil},
		{"manifest without end", onPath("/manifests/", endless), "MiB", nil},
		{"manifest is no JSON", onPath("/manifests/", text("<html>")), "read manifest", nil},
		{"manifest of version 1", onPath("/manifests/", text(`{"schemaVersion":1}`)), "version 1", nil},
		{"manifest and index", onPath("/manifests/", text(`{"schemaVersion":2,"manifests":[],"layers":[]}`)), "index too", nil},
		{"index that says it is a manifest", onPath("/manifests/", text(`{"schemaVersion":2,"manifests":[],"mediaType":"application/vnd.oci.image.manifest.v1+json"}`)), "it is not", nil},
		{"empty index", onPath("/manifests/", text(`{"schemaVersion":2,"manifests":[]}`)), "not for linux", nil},
		{"negative size", onPath("/manifests/", manifest(config, layer("-5", "oci.image.layer.v1.tar"))), "-5 bytes", nil},
		{"size beyond the limit", onPath("/manifests/", manifest(config, layer("9000000000000000000", "oci.image.layer.v1.tar"))), "may have", nil},
		{"sizes that overflow", onPath("/manifests/", manifest(config, layer("5000000000", "oci.image.layer.v1.tar")+","+layer("9223372036854775807", "oci.image.layer.v1.tar"))), "may have", nil},
		{"large configuration", onPath("/manifests/", manifest(`{"digest":"`+sum+`","size":100000000}`, "")), "configuration", nil},
		{"foreign layer", onPath("/manifests/", manifest(config, layer("5", "docker.image.rootfs.foreign.diff.tar.gzip"))), "can't be unpacked", nil},
		{"unknown layer", onPath("/manifests/", manifest(config, layer("5", "wasm.content"))), "can't be unpacked", nil},
		{"other digest", onPath("/manifests/", manifest(`{"digest":"sha512:abc","size":5}`, "")), "", nil},
		{"many layers", onPath("/manifests/", manifest(config, layer("5", "oci.image.layer.v1.tar")+strings.Repeat(","+layer("5", "oci.image.layer.v1.tar"), 600))), "601 layers", nil},
		{"never whole", func(w http.ResponseWriter, r *http.Request, _ int) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return true
			}
			w.Header().Set("Content-Length", "300")
			_, _ = io.WriteString(w, "{")
			panic(http.ErrAbortHandler)
		}, "", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			registry, s := newServer(t), openStore(t, Limits{Image: 1 << 40})
			ref := registry.push(t, want, "image")
			registry.does(test.misbehave)
			image, err := pull(t, s, ref)
			if err == nil {
				t.Fatalf("pulled %+v", image)
			}
			if !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if !strings.Contains(err.Error(), ref.String()) {
				t.Errorf("%v does not name the image", err)
			}
			if found, err := s.Get(ref); !errors.Is(err, smolvm.ErrImageNotFound) {
				t.Errorf("found %+v (%v)", found, err)
			}
			// The same store gets it when the registry has come to its senses.
			registry.does(nil)
			image, err = pull(t, s, ref)
			must(t, err)
			checkWhole(t, s, image, want)
		})
	}
}

func TestPullUnreachable(t *testing.T) {
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	for _, text := range []string{strings.TrimPrefix(closed.URL, "http://") + "/image", "registry.invalid/image"} {
		ref, err := ociref.Parse(text)
		must(t, err)
		if image, err := pull(t, openStore(t, Limits{}), ref); err == nil {
			t.Errorf("pulled %+v from %s", image, ref)
		}
	}
}

// A registry elsewhere is spoken to by TLS only, and does not get at the host's own services.
func TestGuard(t *testing.T) {
	local := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer local.Close()
	for _, test := range []struct {
		url      string
		loopback bool
		want     error
	}{
		{local.URL, true, nil},
		{local.URL, false, errPlain},
		{"http://192.0.2.1/", true, errPlain},
		{"http://10.0.0.1/", false, errPlain},
		{"http://registry.invalid/", false, errPlain},
		{"https://127.0.0.1:1/", false, errPlain},
		{"https://[::1]:1/", false, errPlain},
	} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, test.url, nil)
		must(t, err)
		response, err := guard{http.DefaultTransport, test.loopback}.RoundTrip(request)
		if err == nil {
			_ = response.Body.Close()
		}
		if !errors.Is(err, test.want) {
			t.Errorf("%s for a registry on loopback (%v): %v, want %v", test.url, test.loopback, err, test.want)
		}
	}
}

// Credentials go to the registry that asks for them, as docker's configuration has them.
func TestPullAuthorized(t *testing.T) {
	registry := newServer(t)
	want := imageOf(t, 1, 1000)
	ref := registry.push(t, want, "private/image")
	registry.does(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if user, password, _ := r.BasicAuth(); user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	s := openStore(t, Limits{})
	_, err := pull(t, s, ref)
	var hinted *smolvm.Error
	if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint, "docker login "+registry.host()) {
		t.Errorf("without credentials: %v", err)
	}
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", home)
	t.Setenv("XDG_RUNTIME_DIR", home)
	must(t, os.WriteFile(home+"/config.json", []byte(`{"auths":{"`+registry.host()+`":{"auth":"bWU6c2VjcmV0"}}}`), 0o600))
	access := quick()
	access.Keychain = authn.DefaultKeychain
	image, err := s.Pull(t.Context(), ref, PullOptions{Access: access})
	must(t, err)
	checkWhole(t, s, image, want)
}

// A pull that is killed goes on where it was.
func TestPullKilled(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 3_000_000)
	layers, err := want.Layers()
	must(t, err)
	digest, err := layers[0].Digest()
	must(t, err)
	ref := registry.push(t, want, "image")
	r, err := layers[0].Compressed()
	must(t, err)
	content, err := io.ReadAll(r)
	must(t, err)
	halfway := make(chan struct{})
	registry.does(func(w http.ResponseWriter, r *http.Request, count int) bool {
		if !strings.HasSuffix(r.URL.Path, digest.String()) || count > 1 {
			return false
		}
		_, _ = w.Write(content[:2_000_000])
		_ = http.NewResponseController(w).Flush()
		close(halfway)
		<-r.Context().Done()
		return true
	})
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+s.dir+" "+ref.String())
	must(t, child.Start())
	<-halfway
	part := s.path(partialDir, digest.Hex)
	for { // until what was sent is in its file
		if info, err := os.Stat(part); err == nil && info.Size() >= 1_000_000 {
			break
		}
		must(t, context.Cause(t.Context()))
		time.Sleep(time.Millisecond)
	}
	must(t, child.Process.Kill())
	_ = child.Wait()
	info, err := os.Stat(part)
	must(t, err)
	registry.asked("")
	registry.does(nil)
	image, err := pull(t, s, ref)
	must(t, err)
	checkWhole(t, s, image, want)
	ranges := registry.asked("bytes=")
	if want := fmt.Sprintf("bytes=%d-%d", info.Size(), len(content)-1); len(ranges) != 1 || !strings.HasSuffix(ranges[0], want) {
		t.Errorf("asked for the rest: %q, want %q", ranges, want)
	}
}

// What is there of a blob may be damaged: then it is fetched whole.
func TestPullOverDamagedPart(t *testing.T) {
	registry := newServer(t)
	want := imageOf(t, 1, 100_000)
	ref := registry.push(t, want, "image")
	layers, err := want.Layers()
	must(t, err)
	digest, err := layers[0].Digest()
	must(t, err)
	size, err := layers[0].Size()
	must(t, err)
	for name, length := range map[string]int64{"begins otherwise": 50_000, "is whole": size, "is too long": size + 1} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, Limits{})
			must(t, os.MkdirAll(s.path(partialDir), 0o700), os.WriteFile(s.path(partialDir, digest.Hex), make([]byte, length), 0o600))
			image, err := pull(t, s, ref)
			must(t, err)
			checkWhole(t, s, image, want)
		})
	}
}

// Of several that pull the same at once, one fetches.
func TestPullAtOnce(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 500_000, 500_000)
	ref := registry.push(t, want, "image")
	registry.asked("")
	var group sync.WaitGroup
	for range 6 {
		group.Go(func() {
			own, err := Open(s.dir, Limits{}) // as another process would
			if err == nil {
				_, err = own.Pull(t.Context(), ref, PullOptions{Access: quick()})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	for range 2 {
		child := exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+s.dir+" "+ref.String())
		group.Go(func() {
			if out, err := child.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	group.Wait()
	image, err := s.Get(ref)
	must(t, err)
	checkWhole(t, s, image, want)
	if asked := registry.asked("/blobs/"); len(asked) != 3 {
		t.Errorf("eight pulls at once ask for %q", asked)
	}
}

// Who has seen that a blob is missing just before another one has finished it does not fetch it
// again, and leaves nothing behind.
func TestTakeOfFinishedBlob(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	want := imageOf(t, 1, 10_000)
	_, err := pull(t, s, registry.push(t, want, "image"))
	must(t, err)
	layers, err := want.Layers()
	must(t, err)
	digest, err := layers[0].Digest()
	must(t, err)
	size, err := layers[0].Size()
	must(t, err)
	p, err := s.take(t.Context(), v1.Descriptor{Digest: digest, Size: size}, digest.Hex)
	if p != nil || err != nil {
		t.Errorf("a blob that is there is to be fetched (%v)", err)
	}
	if left := files(t, s, partialDir); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
}

func TestPullLimits(t *testing.T) {
	registry := newServer(t)
	ref := registry.push(t, imageOf(t, 1, 60_000, 60_000), "image")
	registry.asked("")
	if _, err := pull(t, openStore(t, Limits{Image: 100_000}), ref); err == nil || !strings.Contains(err.Error(), "100000") {
		t.Errorf("an image above the limit: %v", err)
	}
	full := errors.New("the disk is full")
	asked := int64(0)
	_, err := pull(t, openStore(t, Limits{Room: func(bytes int64) error {
		asked = bytes
		return full
	}}), ref)
	if !errors.Is(err, full) || asked < 120_000 {
		t.Errorf("without room for %d bytes: %v", asked, err)
	}
	if asked := registry.asked("/blobs/"); len(asked) > 0 {
		t.Errorf("what is refused is asked for: %q", asked)
	}
}

func TestPullInterrupted(t *testing.T) {
	registry, s := newServer(t), openStore(t, Limits{})
	ref := registry.push(t, imageOf(t, 1, 100_000), "image")
	ctx, cancel := context.WithCancelCause(t.Context())
	interrupted := errors.New("interrupted")
	registry.does(func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			cancel(interrupted)
			<-r.Context().Done()
			return true
		}
		return false
	})
	if _, err := s.Pull(ctx, ref, PullOptions{Access: quick()}); !errors.Is(err, interrupted) {
		t.Errorf("a pull that is interrupted: %v", err)
	}
}
