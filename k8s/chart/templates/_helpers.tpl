{{/* Names, labels and the image. The release's name names everything; a pod's labels leave `app.kubernetes.io/name` and `ray.io/*` to KubeRay,
whose services select by them. */}}

{{- define "loopserve.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end }}

{{- define "loopserve.labels" -}}
app.kubernetes.io/name: loopserve
app.kubernetes.io/instance: {{ include "loopserve.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "loopserve.podLabels" -}}
app.kubernetes.io/part-of: loopserve
app.kubernetes.io/instance: {{ include "loopserve.name" . }}
{{- end }}

{{- define "loopserve.image" -}}
{{- with .Values.cluster.image -}}
{{- .repository -}}
{{- if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end -}}
{{- end -}}
{{- end }}

{{/* From here to the end of the last turn, as the pods must see it: Ray drains a node that got SIGTERM for as long as replicas may drain. */}}
{{- define "loopserve.nodeDrainSeconds" -}}
{{- add .Values.serving.drainSeconds 15 -}}
{{- end }}

{{- define "loopserve.graceSeconds" -}}
{{- add .Values.serving.drainSeconds 45 -}}
{{- end }}

{{- define "loopserve.modelCacheClaim" -}}
{{- .Values.cluster.modelCache.existingClaim | default (printf "%s-models" (include "loopserve.name" .)) -}}
{{- end }}
