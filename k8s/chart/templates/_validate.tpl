{{/* What values.schema.json cannot say: two values that do not fit together. Each message names both and a way out. */}}
{{- define "loopserve.validate" -}}
{{- $name := include "loopserve.name" . -}}
{{- $cluster := .Values.cluster -}}
{{- $serving := .Values.serving -}}
{{- $tunables := .Values.tunables -}}
{{- if gt (len $name) 47 }}{{ fail (printf "the name %q has %d characters; KubeRay allows 47. Choose a shorter release name or fullnameOverride." $name (len $name)) }}{{ end }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}{{ fail (printf "the name %q must be lower-case letters, digits and dashes, and begin with a letter." $name) }}{{ end }}
{{- $names := list -}}
{{- $engines := 0 -}}
{{- $fronts := 0 -}}
{{- $gpus := 0 -}}
{{- range $cluster.workerGroups }}
  {{- if has .name $names }}{{ fail (printf "two worker groups are named %q." .name) }}{{ end }}
  {{- $names = append $names .name }}
  {{- if gt (int .minReplicas) (int .maxReplicas) }}{{ fail (printf "worker group %s: minReplicas is %d, more than maxReplicas (%d)." .name (int .minReplicas) (int .maxReplicas)) }}{{ end }}
  {{- if or (lt (int .replicas) (int .minReplicas)) (gt (int .replicas) (int .maxReplicas)) }}{{ fail (printf "worker group %s: replicas is %d, not between minReplicas (%d) and maxReplicas (%d)." .name (int .replicas) (int .minReplicas) (int .maxReplicas)) }}{{ end }}
  {{- if gt (int .minAvailable) (int .minReplicas) }}{{ fail (printf "worker group %s: minAvailable is %d, more than minReplicas (%d); no node could ever be drained." .name (int .minAvailable) (int .minReplicas)) }}{{ end }}
  {{- if has "engine" .roles }}
    {{- $engines = add $engines (int .maxReplicas) }}
    {{- $limits := .resources.limits }}
    {{- if and (gt (float64 $serving.perReplica.gpus) 0.0) (not (index $limits "nvidia.com/gpu")) }}{{ fail (printf "worker group %s is for engines of %v GPU(s), but its limits have no nvidia.com/gpu." .name $serving.perReplica.gpus) }}{{ end }}
  {{- end }}
  {{- if has "front" .roles }}{{ $fronts = add $fronts (int .maxReplicas) }}{{ end }}
{{- end }}
{{- if not $engines }}{{ fail "no worker group has the role `engine`; add it to the roles of one." }}{{ end }}
{{- if not $fronts }}{{ fail "no worker group has the role `front`; add it to the roles of one." }}{{ end }}
{{- with $tunables.autopilot }}
  {{- if gt (int .min_replicas) (int .max_replicas) }}{{ fail (printf "tunables.autopilot: min_replicas is %d, more than max_replicas (%d)." (int .min_replicas) (int .max_replicas)) }}{{ end }}
{{- end }}
{{- if and (eq $serving.topology "direct") $serving.autopilot (eq (int $tunables.autopilot.min_replicas) 0) }}{{ fail "tunables.autopilot.min_replicas is 0, but in topology direct nobody would be there to answer; set it to 1." }}{{ end }}
{{- if $serving.autopilot }}
  {{- $most := int $tunables.autopilot.max_replicas }}
  {{- if eq $tunables.autopilot.mode "on" }}
    {{- if or (lt (int $tunables.replicas) (int $tunables.autopilot.min_replicas)) (gt (int $tunables.replicas) $most) }}{{ fail (printf "tunables.replicas is %d, where the autopilot starts; it must lie between tunables.autopilot.min_replicas (%d) and max_replicas (%d)." (int $tunables.replicas) (int $tunables.autopilot.min_replicas) $most) }}{{ end }}
  {{- end }}
{{- end }}
{{- with $serving.perReplica.maxPerNode }}
  {{- $most := int $tunables.replicas }}
  {{- if and $serving.autopilot (eq $tunables.autopilot.mode "on") }}{{ $most = max $most (int $tunables.autopilot.max_replicas) }}{{ end }}
  {{- if gt $most (mul $engines .) }}{{ fail (printf "%d engine replicas may be wanted, but the worker groups for engines hold at most %d (maxReplicas times perReplica.maxPerNode); raise maxReplicas." $most (mul $engines .)) }}{{ end }}
{{- end }}
{{- with $cluster.modelCache }}
  {{- if and .enabled (eq .accessMode "ReadWriteOnce") (gt (add $engines 0) 1) }}{{ fail (printf "modelCache.accessMode is ReadWriteOnce, which one node can mount, but engines may run on %d; choose ReadWriteMany." $engines) }}{{ end }}
{{- end }}
{{- with $cluster.gcsFaultTolerance }}
  {{- if and .enabled (not .redisAddress) }}{{ fail "cluster.gcsFaultTolerance is enabled without a redisAddress." }}{{ end }}
{{- end }}
{{- with .Values.ingress }}
  {{- if and .enabled (not .host) }}{{ fail "ingress is enabled without a host." }}{{ end }}
{{- end }}
{{- range $cluster.env }}
  {{- if hasPrefix "LOOPSERVE_" .name }}{{ fail (printf "cluster.env sets %s; settings of LoopServe belong into serving.settings and serving.engine, where they are checked." .name) }}{{ end }}
  {{- if has .name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_enable_autoscaler_v2") }}{{ fail (printf "cluster.env sets %s, which KubeRay sets from the RayService; use cluster.gcsFaultTolerance or cluster.autoscaler." .name) }}{{ end }}
{{- end }}
{{- end }}
