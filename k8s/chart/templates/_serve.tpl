{{/* serveConfigV2: what KubeRay sends to Ray Serve. Kept so that a change of `tunables` touches nothing that restarts a replica: Serve
restarts all of an application's replicas when import_path, runtime_env, args or a router changes, and a deployment's when its
ray_actor_options change; num_replicas, user_config, health checks and graceful shutdown change in place. But whatever changes of a
deployment, its number of replicas is set to num_replicas again, whatever an external scaler has made of it: so the only tunable of
EngineReplica is that number itself. */}}
{{- define "loopserve.serveConfig" -}}
{{- $serving := .Values.serving -}}
{{- $tunables := .Values.tunables -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
applications:
  - name: loopserve
    route_prefix: /
    import_path: deploy.app:application
    external_scaler_enabled: {{ $serving.autopilot }}
    {{- with $serving.engine }}
    runtime_env:
      env_vars:
        {{- range $name, $value := . }}
        {{- if kindIs "map" $value }}
        {{- range $inner, $value := $value }}
        LOOPSERVE_ENGINE_{{ $name | upper }}__{{ $inner | upper }}: {{ include "loopserve.envValue" $value }}
        {{- end }}
        {{- else }}
        LOOPSERVE_ENGINE_{{ $name | upper }}: {{ include "loopserve.envValue" $value }}
        {{- end }}
        {{- end }}
    {{- end }}
    args:
      {{- include "loopserve.args" . | trim | nindent 6 }}
    deployments:
      - name: EngineReplica
        num_replicas: {{ $tunables.replicas | int }}
        {{- with $serving.perReplica.maxPerNode }}
        max_replicas_per_node: {{ . }}
        {{- end }}
        graceful_shutdown_timeout_s: {{ $serving.drainSeconds }}
        ray_actor_options:
          num_cpus: {{ $serving.perReplica.cpus }}
          num_gpus: {{ $serving.perReplica.gpus }}
          resources: {loopserve_engine: 0.001}
      {{- if eq $serving.topology "direct" }}
      - name: SessionRouter
        max_ongoing_requests: {{ $tunables.ongoingPerIngress | int }}
        graceful_shutdown_timeout_s: {{ $serving.drainSeconds }}
      {{- else }}
      - name: Ingress
        num_replicas: {{ $serving.ingressReplicas | int }}
        max_ongoing_requests: {{ $tunables.ongoingPerIngress | int }}
        graceful_shutdown_timeout_s: {{ $serving.drainSeconds }}
        ray_actor_options:
          num_cpus: {{ $serving.perIngress.cpus }}
          resources: {loopserve_front: 0.001}
      {{- end }}
      {{- if $serving.autopilot }}
      - name: Autopilot
        user_config:
          {{- include "loopserve.record" $tunables.autopilot | trim | nindent 10 }}
        ray_actor_options:
          num_cpus: 0.1
          resources: {loopserve_front: 0.001}
      {{- end }}
{{- end }}

{{/* The settings of the deployment, `deploy.settings.DeploySettings`. */}}
{{- define "loopserve.args" -}}
{{- $serving := .Values.serving -}}
{{- $keys := .Values.cluster.apiKeys -}}
{{- /* A container sees its node's cores, not its share of them. */ -}}
{{- $args := dict "torch_threads" (max 1 (int $serving.perReplica.cpus)) -}}
{{- if $keys.secretName -}}
{{- /* The page of metrics stays open to what the network policy lets in; the ingress does not route it. */ -}}
{{- $_ := set $args "keys_file" (printf "%s/%s" $keys.mountPath $keys.key) -}}
{{- $_ := set $args "open_metrics" true -}}
{{- end -}}
{{- $args = mergeOverwrite $args (deepCopy $serving.settings) -}}
{{- $_ := set $args "topology" $serving.topology -}}
{{- $_ := set $args "ingress_replicas" (int $serving.ingressReplicas) -}}
{{- if $serving.autopilot -}}
{{- /* Anything but off: that there is one. What it does is said by its user_config, which may change. */ -}}
{{- $_ := set $args "autopilot" (dict "mode" "dry-run") -}}
{{- end -}}
{{- $_ := set $args "model" $serving.model -}}
{{- $_ := set $args "device" $serving.device -}}
{{- $_ := set $args "stop_timeout_s" $serving.drainSeconds -}}
{{- include "loopserve.record" $args -}}
{{- end }}

{{/* A map, a line an entry. Values as JSON: Helm holds every number as a float, and YAML would write 8388608 as 8.388608e+06. */}}
{{- define "loopserve.record" -}}
{{- range $name, $value := . }}
{{ $name }}: {{ toJson $value }}
{{- end }}
{{- end }}

{{/* A setting as text: what is no text as JSON, as the engine reads it. */}}
{{- define "loopserve.envValue" -}}
{{- kindIs "string" . | ternary . (toJson .) | quote -}}
{{- end }}
