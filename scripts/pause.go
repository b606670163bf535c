// The first process of each pod on the real nodes of `make e2e`: it only waits, and so keeps the pod's namespaces.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGINT, syscall.SIGTERM)
	<-asked
}
