{{- define "llm-d-router.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- contains "llm-d" .Release.Name | ternary .Release.Name (printf "%s-llm-d" .Release.Name) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "llm-d-router.labels" -}}
{{- with .Values.labels -}}
{{ toYaml . }}
{{ end -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "llm-d-router.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: pdctl
{{- end -}}

{{- define "llm-d-router.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: router
{{- end -}}

{{- define "llm-d-router.engines" -}}
app.kubernetes.io/name: pd-engines
app.kubernetes.io/instance: {{ .Values.engines.release }}
{{- end -}}

{{- define "llm-d-router.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}

{{/* The configuration that was written for this release, or the preset's. */}}
{{- define "llm-d-router.picking" -}}
{{ default (.Files.Get (printf "presets/%s.yaml" .Values.epp.preset)) .Values.epp.config }}
{{- end -}}

{{- define "llm-d-router.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* All three end together, after the requests under way: none of them drains by itself on SIGTERM. */}}
{{- define "llm-d-router.lifecycle" -}}
preStop:
  sleep:
    seconds: {{ add (int .Values.shutdown.leaveSeconds) (int .Values.shutdown.drainSeconds) }}
{{- end -}}
