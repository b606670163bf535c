{{/* Parts of pods. */}}

{{- define "pd-engines.podSecurity" -}}
{{- $asRoot := and .Values.rdma.resourceName .Values.rdma.ipcLock -}}
runAsNonRoot: {{ not $asRoot }}
{{- if $asRoot }}
runAsUser: 0
{{- else if .Values.runAsUser }}
runAsUser: {{ int .Values.runAsUser }}
runAsGroup: {{ int .Values.runAsUser }}
fsGroup: {{ int .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "pd-engines.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  {{- if and .Values.rdma.resourceName .Values.rdma.ipcLock }}
  add: [IPC_LOCK]
  {{- end }}
{{- end -}}

{{- define "pd-engines.resources" -}}
{{- $values := .root.Values -}}
{{- $role := get $values .role -}}
{{- $devices := dict $values.gpu.resourceName (int $role.tensorParallelSize | toString) -}}
{{- with $values.rdma.resourceName -}}
{{- $_ := set $devices . (int $values.rdma.count | toString) -}}
{{- end -}}
{{- toYaml (dict
  "requests" (merge (dict) $devices (default (dict) $role.resources.requests))
  "limits" (merge (dict) $devices (default (dict) $role.resources.limits))
) -}}
{{- end -}}

{{- define "pd-engines.cacheVolume" -}}
name: model-cache
{{- if eq .Values.cache.mode "emptyDir" }}
emptyDir:
  sizeLimit: {{ .Values.cache.size }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ include "pd-engines.claim" . }}
{{- end }}
{{- end -}}
