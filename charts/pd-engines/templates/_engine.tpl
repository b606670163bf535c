{{/* How an engine is called: its arguments, its environment. Both take (dict "root" $ "role" "prefill"). */}}

{{- define "pd-engines.kvTransferConfig" -}}
{{- $kv := .root.Values.kv -}}
{{- $extra := merge (dict "backends" $kv.backends "kv_lease_duration" $kv.leaseSeconds) $kv.extraConfig -}}
{{- $config := dict "kv_connector" "NixlConnector" "kv_role" (eq .role "prefill" | ternary "kv_producer" "kv_consumer") "kv_connector_extra_config" $extra -}}
{{- if eq .role "decode" -}}
{{- $_ := set $config "kv_load_failure_policy" $kv.loadFailurePolicy -}}
{{- end -}}
{{ toJson $config }}
{{- end -}}

{{- define "pd-engines.args" -}}
{{- $values := .root.Values -}}
{{- $role := get $values .role -}}
- {{ $values.model.name | quote }}
{{- with $values.model.servedNames }}
- --served-model-name
{{- range . }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- with $values.model.revision }}
- {{ printf "--revision=%s" . | quote }}
{{- end }}
- --host=0.0.0.0
- --port={{ int $role.port }}
- --tensor-parallel-size={{ int $role.tensorParallelSize }}
{{- with $values.model.maxLength }}
- --max-model-len={{ int . }}
{{- end }}
- --block-size={{ int $values.kv.blockSize }}
- {{ printf "--kv-transfer-config=%s" (include "pd-engines.kvTransferConfig" .) | squote }}
- --disable-access-log-for-endpoints=/health,/metrics
- --shutdown-timeout={{ int $values.shutdown.drainSeconds }}
{{- range concat $values.args $role.args }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The chart's own, the common, the role's own. */}}
{{- define "pd-engines.env" -}}
{{- $values := .root.Values -}}
{{- $role := get $values .role -}}
{{- $env := dict
  "HOME" "/scratch"
  "HF_HOME" "/model-cache"
  "USER" "vllm"
  "VLLM_ENGINE_READY_TIMEOUT_S" (int $values.startupSeconds)
  "VLLM_HTTP_TIMEOUT_KEEP_ALIVE" 120
  "VLLM_NIXL_SIDE_CHANNEL_HOST" (dict "valueFrom" (dict "fieldRef" (dict "fieldPath" "status.podIP")))
  "VLLM_NIXL_SIDE_CHANNEL_PORT" (int $values.kv.sideChannelPort)
-}}
{{- if has "UCX" $values.kv.backends -}}
{{- $_ := set $env "UCX_TCP_PORT_RANGE" $values.kv.tcpPorts -}}
{{- end -}}
{{- $hub := include "pd-engines.hubEnv" .root | fromYaml -}}
{{- if eq $values.cache.mode "download" -}}
{{- $hub = dict "HF_HUB_OFFLINE" 1 "HF_MODULES_CACHE" "/scratch/hf-modules" -}}
{{- end -}}
{{ include "pd-engines.envList" (list $env $hub $values.env $role.env) }}
{{- end -}}

{{/* What reaching the hub needs. The Xet transfer is off: its servers answer 429 when many pods fetch at once. */}}
{{- define "pd-engines.hubEnv" -}}
HF_HUB_DISABLE_XET: 1
HF_HUB_DOWNLOAD_TIMEOUT: 60
{{- with .Values.huggingFace }}
{{- if .existingSecret }}
HF_TOKEN: {valueFrom: {secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .secretKey | quote }}}}}
{{- end }}
{{- end }}
{{- end -}}

{{/* A container's env from a list of maps by name: a name is there once, and the last map that has it decides. */}}
{{- define "pd-engines.envList" -}}
{{- $env := dict -}}
{{- range $map := . -}}
{{- range $name, $told := $map -}}
{{- $_ := set $env $name $told -}}
{{- end -}}
{{- end -}}
{{- range $index, $name := keys $env | sortAlpha }}
{{- $told := get $env $name }}
{{- if $index }}
{{ end -}}
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
