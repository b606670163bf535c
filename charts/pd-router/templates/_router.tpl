{{/* The router's configuration file. */}}
{{- define "pd-router.config" -}}
{{- $values := .Values -}}
{{- $config := deepCopy $values.config -}}
{{- range $role := list "prefill" "decode" -}}
{{- $told := dict "root" $ "role" $role -}}
{{- $source := include "pd-router.source" $told -}}
{{- if eq $source "selector" -}}
{{- $_ := set $config (printf "%s_selector" $role) (include "pd-router.engineselector" $told) -}}
{{- else if eq $source "dns" -}}
{{- $_ := set $config (printf "%s_dns" $role) (get $values.engines $role).dns -}}
{{- else if eq $source "urls" -}}
{{- $_ := set $config $role (get $values.engines $role).urls -}}
{{- end -}}
{{- end -}}
{{- if include "pd-router.watches" . -}}
{{- $_ := set $config "service_discovery_namespace" (include "pd-router.enginesNamespace" .) -}}
{{- if $values.engines.release -}}
{{- $_ := set $config "service_discovery_port" "http" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config "port" (int $values.service.port) -}}
{{- $_ := set $config "prometheus_port" (int $values.service.metricsPort) -}}
{{- $_ := set $config "admin_port" (int $values.adminPort) -}}
{{- $_ := set $config "drain_timeout_secs" (int $values.shutdown.drainSeconds) -}}
{{- if $values.apiKey.existingSecret -}}
{{- $_ := set $config "api_key_file" "/etc/pd-router/api-key/key" -}}
{{- end -}}
{{- if $values.tls.existingSecret -}}
{{- $_ := set $config "tls_cert_file" "/etc/pd-router/tls/tls.crt" -}}
{{- $_ := set $config "tls_key_file" "/etc/pd-router/tls/tls.key" -}}
{{- end -}}
{{ toYaml $config }}
{{- end -}}

{{- define "pd-router.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pd-router.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "pd-router.env" -}}
{{- range $name, $told := . }}
- name: {{ $name }}
  {{- if kindIs "map" $told }}
  {{- toYaml $told | nindent 2 }}
  {{- else if kindIs "float64" $told }}
  value: {{ eq (floor $told) $told | ternary (printf "%.0f" $told) (toString $told) | quote }}
  {{- else }}
  value: {{ toString $told | quote }}
  {{- end }}
{{- end }}
{{- end -}}
