{{- define "pd-router.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $there := or (contains $name .Release.Name) (and (not .Values.nameOverride) (contains "router" .Release.Name)) -}}
{{- ($there | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "pd-router.labels" -}}
{{- with .Values.labels -}}
{{ toYaml . }}
{{ end -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: pdctl
{{- end -}}

{{/* The component keeps the pod of `helm test` out of the Service. */}}
{{- define "pd-router.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end -}}

{{/* Whether another release's router serves and this one has no pods. */}}
{{- define "pd-router.away" -}}
{{- if and .Values.service.release (not .Values.service.standby) -}}yes{{- end -}}
{{- end -}}

{{- define "pd-router.testselector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{- define "pd-router.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "pd-router.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "pd-router.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ default .Chart.AppVersion .Values.image.tag }}{{ end }}
{{- end -}}

{{- define "pd-router.enginesNamespace" -}}
{{ default .Release.Namespace .Values.engines.namespace }}
{{- end -}}

{{/* What a role's engines are found by: selector, dns, urls; empty when nothing says so. */}}
{{- define "pd-router.source" -}}
{{- $told := get .root.Values.engines .role -}}
{{- if .root.Values.engines.release -}}selector
{{- else if $told.selector -}}selector
{{- else if $told.dns -}}dns
{{- else if $told.urls -}}urls
{{- end -}}
{{- end -}}

{{- define "pd-router.engineselector" -}}
{{- $told := get .root.Values.engines .role -}}
{{- if .root.Values.engines.release -}}
app.kubernetes.io/name=pd-engines,app.kubernetes.io/instance={{ .root.Values.engines.release }},llm-d.ai/role={{ .role }}
{{- else -}}
{{ $told.selector }}
{{- end -}}
{{- end -}}

{{/* Whether the router asks the Kubernetes API. */}}
{{- define "pd-router.watches" -}}
{{- range $role := list "prefill" "decode" -}}
{{- if eq (include "pd-router.source" (dict "root" $ "role" $role)) "selector" -}}yes{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pd-router.scrape" -}}
{{- $scrape := .Values.monitoring.scrape -}}
{{- if eq $scrape "auto" -}}
{{- $scrape = ternary "serviceMonitor" "annotations" (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/ServiceMonitor") -}}
{{- end -}}
{{ $scrape }}
{{- end -}}
