// Command httpsget is an HTTPS client for tests in guests, which trusts whom the environment
// says: `httpsget [-http1] [-insecure] URL TOKEN` sends a token as programs do, and prints the
// status, the issuer of the server's certificate, and the answer, a line each.
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

func main() {
	http1 := flag.Bool("http1", false, "speak HTTP/1.1")
	insecure := flag.Bool("insecure", false, "trust any server")
	flag.Parse()
	if err := get(flag.Arg(0), flag.Arg(1), *http1, *insecure); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func get(url, token string, http1, insecure bool) error {
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		ForceAttemptHTTP2: !http1, TLSClientConfig: &tls.Config{InsecureSkipVerify: insecure},
	}}
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }()
	_, _ = fmt.Printf("%s %d\n%s\n", answer.Proto, answer.StatusCode, answer.TLS.PeerCertificates[0].Issuer)
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
