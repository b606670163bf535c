#!/usr/bin/env bash
# Fills .tools with the programs that tests of the charts and of Kubernetes call: .tools/bin, and .tools/schemas for
# kubeconform.
# A program on PATH of a fitting version is linked. Everything else is built with Go, once for each user: finished
# builds are kept under $XDG_CACHE_HOME/pdctl/tools and linked by every checkout.
# usage: scripts/tools.sh [NAME...]     all when none is named
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pdctl/tools
# One compiler process for each core needs about 1 GB each; TOOLS_JOBS=1 is kinder to a busy machine.
jobs=${TOOLS_JOBS:-$(nproc 2>/dev/null || echo 2)}

# The one place for versions.
# name            version   module                                            its main package      where it keeps its version
pins='
  helm            v4.2.4    helm.sh/helm/v4                                   cmd/helm              helm.sh/helm/v4/internal/version.version
  helm3           v3.21.4   helm.sh/helm/v3                                   cmd/helm              helm.sh/helm/v3/internal/version.version
  helmfile        v1.7.4    github.com/helmfile/helmfile                      .                     go.szostok.io/version.version
  helm-unittest   v1.1.2    github.com/helm-unittest/helm-unittest            cmd/helm-unittest     main.version
  helm-docs       v1.14.2   github.com/norwoodj/helm-docs                     cmd/helm-docs         main.version
  helm-schema     v2.3.1    github.com/losisin/helm-values-schema-json/v2     .                     main.Version
  kubeconform     v0.7.0    github.com/yannh/kubeconform                      cmd/kubeconform       main.version
  etcd            v3.6.14   go.etcd.io/etcd/server/v3                         .                     -
  kube-apiserver  v1.36.3   k8s.io/kubernetes                                 cmd/kube-apiserver    k8s.io/component-base/version.gitVersion
  kube-controller-manager v1.36.3 k8s.io/kubernetes                         cmd/kube-controller-manager k8s.io/component-base/version.gitVersion
  kube-scheduler  v1.36.3   k8s.io/kubernetes                                 cmd/kube-scheduler    k8s.io/component-base/version.gitVersion
  kubectl         v1.36.3   k8s.io/kubernetes                                 cmd/kubectl           k8s.io/component-base/version.gitVersion
  kubelet         v1.36.3   k8s.io/kubernetes                                 cmd/kubelet           k8s.io/component-base/version.gitVersion
  kube-proxy      v1.36.3   k8s.io/kubernetes                                 cmd/kube-proxy        k8s.io/component-base/version.gitVersion
  coredns         v1.14.1   github.com/coredns/coredns                        .                     -
  kwok            v0.8.0    sigs.k8s.io/kwok                                  cmd/kwok              sigs.k8s.io/kwok/pkg/consts.Version
'
# Modules that hold the custom resources which the charts may render; a name of its own for them: crds.
prometheus_operator=github.com/prometheus-operator/prometheus-operator@v0.85.0
keda=github.com/kedacore/keda/v2@v2.21.0
inference=sigs.k8s.io/gateway-api-inference-extension@v1.5.0

# What the go.mod of a MODULE at a VERSION replaces: Go follows that only in the main module, so it is said again here.
replaced() {
  local part
  case $1 in
    */helmfile) printf '%s\n' 'k8s.io/api => k8s.io/api v0.35.4' 'k8s.io/apimachinery => k8s.io/apimachinery v0.36.0' \
      'k8s.io/client-go => k8s.io/client-go v0.35.4' ;;
    */helm-unittest) echo 'github.com/vmware-labs/yaml-jsonpath v0.3.2 => github.com/helm-unittest/yaml-jsonpath v0.4.0' ;;
    k8s.io/kubernetes) # its parts are required as v0.0.0, which only its own repository has
      for part in api apiextensions-apiserver apimachinery apiserver cli-runtime client-go cloud-provider \
        cluster-bootstrap code-generator component-base component-helpers controller-manager cri-api cri-client \
        cri-streaming csi-translation-lib dynamic-resource-allocation endpointslice externaljwt kms kube-aggregator \
        kube-controller-manager kube-proxy kube-scheduler kubectl kubelet metrics mount-utils pod-security-admission \
        sample-apiserver sample-cli-plugin sample-controller streaming; do
        echo "k8s.io/$part => k8s.io/$part v0.${2#v1.}"
      done ;;
  esac
}

say() { echo "tools: $*" >&2; }
die() { say "$*"; exit 1; }
pin() { awk -v name="$1" -v column="$2" '$1 == name {print $column}' <<<"$pins"; }

# Which version of a program on PATH will do: an extended regular expression for what it says of itself. Programs that
# write files which are compared (helm-docs, helm-schema) must be the very version.
fits() {
  local path said
  path=$(command -v "$1") || return 1
  case $1 in
    helm) said=$("$path" version --template '{{.Version}}' 2>/dev/null) && grep -qE '^v4\.([2-9]|[1-9][0-9])' <<<"$said" ;;
    helmfile) said=$("$path" version -o short 2>/dev/null) && grep -qE '^v?1\.([7-9]|[1-9][0-9])' <<<"$said" ;;
    kubeconform) said=$("$path" -v 2>/dev/null) && grep -qE '^v0\.([7-9]|[1-9][0-9])' <<<"$said" ;;
    kubectl) said=$("$path" version --client 2>/dev/null) && grep -qE '^Client Version: v1\.(3[5-7])\.[0-9]+$' <<<"$said" ;;
    kube-* | kubelet) said=$("$path" --version 2>/dev/null) && [ "$said" = "Kubernetes $(pin "$1" 2)" ] ;;
    etcd) said=$("$path" --version 2>/dev/null) && grep -qE '^etcd Version: 3\.([6-9]|[1-9][0-9])' <<<"$said" ;;
    *) return 1 ;;
  esac
}

# Builds NAME in the current folder, in a module of its own that requires the program's.
build() {
  local name=$1 version module package flags variable
  version=$(pin "$name" 2) module=$(pin "$name" 3) package=$(pin "$name" 4)
  printf 'module around\n\ngo 1.26.0\n\nrequire %s %s\n\nreplace (\n%s\n)\n' "$module" "$version" "$(replaced "$module" "$version")" > go.mod
  [ "$package" = . ] && package=$module || package=$module/$package
  flags="-s -w"
  variable=$(pin "$name" 5)
  if [ "$variable" != - ]; then flags+=" -X $variable=$version"; fi
  if [ "$module" = k8s.io/kubernetes ]; then # also in parts, which the API server tells
    flags+=" -X ${variable%Version}Major=1 -X ${variable%Version}Minor=$(cut -d. -f2 <<<"$version")"
  fi
  CGO_ENABLED=0 go build -p "$jobs" -mod=mod -trimpath -ldflags "$flags" -o "$name" "$package"
  if [ "$name" = kwok ]; then # its custom resources, and the stages in the life of a fake pod, are files beside it
    cp -R "$(go list -mod=mod -m -f '{{.Dir}}' "$module")/kustomize" .
    chmod -R u+w kustomize
  fi
  rm go.mod go.sum
}

folder_of() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }

# JSON schemas of the custom resources that the charts may render, by kubeconform's own converter; and the definition of
# InferencePool itself, which a cluster must have before it takes one.
crd_schemas() {
  local operator scaler checker crds
  operator=$(folder_of "$prometheus_operator") scaler=$(folder_of "$keda")
  install -m 644 "$(folder_of "$inference")/config/crd/bases/inference.networking.k8s.io_inferencepools.yaml" inferencepools.yaml
  checker=$(folder_of "github.com/yannh/kubeconform@$(pin kubeconform 2)")
  crds=$operator/example/prometheus-operator-crd/monitoring.coreos.com
  [ -x "$root/.venv/bin/python" ] || die "crds: there is no .venv yet; call make tools, or make setup first"
  FILENAME_FORMAT='{kind}-{group}-{version}' "$root/.venv/bin/python" "$checker/scripts/openapi2jsonschema.py" \
    "${crds}_podmonitors.yaml" "${crds}_servicemonitors.yaml" "${crds}_prometheusrules.yaml" \
    "$scaler/config/crd/bases/keda.sh_scaledobjects.yaml" inferencepools.yaml >/dev/null
}

# The container that holds a pod's namespaces open on real nodes.
pause() { CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o pause "$root/scripts/pause.go"; }

# What real nodes need of the system, since runc and the plugins are not built by Go alone: installed by root where the
# package manager is known, else told. Without them only the tests on real nodes are left out.
lacking() {
  local name
  for name in containerd runc nft; do command -v $name >/dev/null || echo ${name/nft/nftables}; done
  [ -x /usr/lib/cni/bridge ] || [ -x /opt/cni/bin/bridge ] || echo containernetworking-plugins
}
node_packages() {
  local missing
  mapfile -t missing < <(lacking)
  [ ${#missing[@]} = 0 ] && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} with apt-get"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"; } >/dev/null || true
  fi
  mapfile -t missing < <(lacking)
  [ ${#missing[@]} = 0 ] || say "make e2e needs ${missing[*]}, which only the system's package manager has; going on without"
}

# Gives where NAME is in the cache, and makes it when it is not there yet; VERSION is what its entry is called by.
# Waits while another checkout makes the same; what is in the cache is always whole, since it is moved there.
cached() {
  local name=$1 version=$2 make=$3 entry work began status
  entry=$cache/$name-$version-$(uname -s)-$(uname -m)
  if [ ! -e "$entry" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/.$name.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if [ ! -e "$entry" ]; then
      command -v go >/dev/null || die "$name: nothing that fits is on PATH, and no go to build it with; install Go 1.26 or newer"
      began=$SECONDS
      say "$name $version: building; kept in $cache"
      work=$(mktemp -d "$cache/.$name.XXXXXX")
      set +e
      ( set -e; cd "$work"; "$make" "$name" ) > "$work.log" 2>&1
      status=$?
      set -e
      if [ $status != 0 ]; then
        tail -n 20 "$work.log" >&2
        rm -rf "$work" "$work.log"
        die "$name cannot be built; its last lines are above"
      fi
      rm "$work.log"
      mv "$work" "$entry"
      say "$name: done in $((SECONDS - began)) s"
    fi
    exec 9>&-
  fi
  echo "$entry"
}

known="$(awk 'NF {print $1}' <<<"$pins") crds pause node"
mkdir -p .tools/bin
for name in ${*:-$known}; do
  grep -qw -- "$name" <<<"${known//$'\n'/ }" || die "there is no $name; known: ${known//$'\n'/ }"
  if [ "$name" = crds ]; then
    entry=$(cached crds "${prometheus_operator##*@}-${keda##*@}-${inference##*@}" crd_schemas)
    ln -sfn "$entry" .tools/schemas
  elif [ "$name" = pause ]; then
    entry=$(cached pause 1 pause)
    ln -sf "$entry/pause" .tools/bin/pause
  elif [ "$name" = node ]; then
    node_packages
  elif fits "$name"; then
    ln -sf "$(command -v "$name")" ".tools/bin/$name"
  else
    entry=$(cached "$name" "$(pin "$name" 2)" build)
    ln -sf "$entry/$name" ".tools/bin/$name"
  fi
done
