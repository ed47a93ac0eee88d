{{/* What the pods of the head and of the workers have in common. KubeRay adds by itself: probes, /dev/shm, the `metrics` port, the address of
the head, the token, and (autoscaler v2) restartPolicy Never. */}}

{{/* Streaming through two hops with these costs less than half of the CPU a token that Ray's defaults cost; the same as a local run sets. */}}
{{- define "loopserve.env" -}}
- name: RAY_SERVE_USE_GRPC_BY_DEFAULT
  value: "1"
- name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP
  value: "0"
- name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD
  value: "0"
- name: RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE
  value: "1000"
- name: RAY_SERVE_LOG_TO_STDERR
  value: "0"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ include "loopserve.nodeDrainSeconds" . | quote }}
{{- if eq .Values.serving.topology "direct" }}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
- name: RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY
  value: "1"
{{- end }}
{{- with .Values.cluster.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of workers only: the head loads no model. */}}
{{- define "loopserve.workerEnv" -}}
- name: HF_HOME
  value: {{ .Values.cluster.modelCache.mountPath }}
{{- with .Values.cluster.hubToken.secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.cluster.hubToken.key }}
{{- end }}
{{- end }}

{{/* Sessions that are handed over travel through Ray's object store in pieces of 8 MiB; by itself it would take 30 % of a pod's memory. */}}
{{- define "loopserve.objectStoreBytes" -}}
209715200
{{- end }}

{{- define "loopserve.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "loopserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.cluster.runAsUser }}
runAsGroup: {{ .Values.cluster.runAsUser }}
fsGroup: {{ .Values.cluster.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Workers only: the head loads no model and answers no client. */}}
{{- define "loopserve.volumeMounts" -}}
- name: models
  mountPath: {{ .Values.cluster.modelCache.mountPath }}
{{- if .Values.cluster.apiKeys.secretName }}
- name: api-keys
  mountPath: {{ .Values.cluster.apiKeys.mountPath }}
  readOnly: true
{{- end }}
{{- end }}

{{- define "loopserve.volumes" -}}
{{- $root := .root -}}
- name: models
{{- if and $root.Values.cluster.modelCache.enabled (has "engine" .roles) }}
  persistentVolumeClaim:
    claimName: {{ include "loopserve.modelCacheClaim" $root }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- with $root.Values.cluster.apiKeys.secretName }}
- name: api-keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end }}

{{/* Parts of a pod's spec but its containers. `enableServiceLinks: false`: a Service named loopserve-... in the namespace would put
LOOPSERVE_..._PORT into every pod, and an unknown setting is an error. */}}
{{- define "loopserve.podSpec" -}}
{{- $root := .root -}}
{{- with .place -}}
enableServiceLinks: false
automountServiceAccountToken: {{ .needsKubernetes | default false }}
terminationGracePeriodSeconds: {{ include "loopserve.graceSeconds" $root }}
securityContext:
  {{- include "loopserve.podSecurity" $root | nindent 2 }}
{{- with $root.Values.cluster.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpread }}
topologySpreadConstraints:
  - maxSkew: {{ .maxSkew }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "loopserve.podLabels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
{{- end }}
{{- end }}
{{- end }}
