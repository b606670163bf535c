{{/* Names and labels. A role's helpers take (dict "root" $ "role" "prefill"). */}}

{{- define "pd-engines.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "pd-engines.rolename" -}}
{{ include "pd-engines.fullname" .root }}-{{ .role }}
{{- end -}}

{{- define "pd-engines.labels" -}}
{{- with .Values.labels -}}
{{ toYaml . }}
{{ end -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: pdctl
{{- end -}}

{{/* What a role's Deployment, Service, budget and policies select by: never only labels that another release has too. */}}
{{- define "pd-engines.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
llm-d.ai/role: {{ .role }}
{{- end -}}

{{- define "pd-engines.rolelabels" -}}
{{ include "pd-engines.labels" .root }}
app.kubernetes.io/component: {{ .role }}
llm-d.ai/role: {{ .role }}
llm-d.ai/inference-serving: "true"
{{- end -}}

{{/* Without the chart's version: a new version alone is no reason to restart engines. */}}
{{- define "pd-engines.podlabels" -}}
{{- with merge (dict) (get .root.Values .role).podLabels .root.Values.labels -}}
{{ toYaml . }}
{{ end -}}
{{ include "pd-engines.selector" . }}
app.kubernetes.io/component: {{ .role }}
app.kubernetes.io/part-of: pdctl
llm-d.ai/inference-serving: "true"
{{- end -}}

{{- define "pd-engines.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "pd-engines.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "pd-engines.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- define "pd-engines.claim" -}}
{{ default (printf "%s-model-cache" (include "pd-engines.fullname" .)) .Values.cache.existingClaim }}
{{- end -}}

{{/* Changes with what is downloaded: a Job cannot be altered, and another model needs another download. */}}
{{- define "pd-engines.download" -}}
{{ include "pd-engines.fullname" . }}-download-{{ printf "%s@%s:%s" .Values.model.name .Values.model.revision (include "pd-engines.image" .) | sha256sum | trunc 8 }}
{{- end -}}

{{/* Made by the download Job as its last act, named by model and revision. */}}
{{- define "pd-engines.downloaded" -}}
/model-cache/.downloaded/{{ printf "%s@%s" .Values.model.name .Values.model.revision | sha256sum | trunc 16 }}
{{- end -}}

{{- define "pd-engines.scrape" -}}
{{- $scrape := .Values.monitoring.scrape -}}
{{- if eq $scrape "auto" -}}
{{- $scrape = ternary "podMonitor" "annotations" (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PodMonitor") -}}
{{- end -}}
{{ $scrape }}
{{- end -}}
