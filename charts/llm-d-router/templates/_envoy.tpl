{{/* Envoy's configuration. Clients come to the first listener, where the endpoint picker is asked; the sidecar calls the
second with the decode leg, which goes to the engine that the picker has named. */}}
{{- define "llm-d-router.envoy" -}}
admin:
  address: {socket_address: {address: 127.0.0.1, port_value: {{ int .Values.adminPort }}}}
static_resources:
  listeners:
    - name: clients
      address: {socket_address: {address: 0.0.0.0, port_value: {{ int .Values.service.port }}}}
      per_connection_buffer_limit_bytes: 32768
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: clients
                use_remote_address: true
                normalize_path: true
                merge_slashes: true
                server_header_transformation: PASS_THROUGH
                # Where a request goes is the picker's to say, not the client's.
                early_header_mutation_extensions:
                  - name: envoy.http.early_header_mutation.header_mutation
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
                      mutations:
                        - remove: x-gateway-destination-endpoint
                        - remove: x-prefiller-host-port
                http_filters:
                  # Up as long as Envoy is; whether engines are is for the picker's own probe.
                  - name: envoy.filters.http.health_check
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
                      pass_through_mode: false
                      headers: [{name: ":path", string_match: {exact: /health}}]
                  - name: envoy.filters.http.ext_proc
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
                      failure_mode_allow: false
                      message_timeout: 1000s
                      grpc_service: {timeout: 10s, envoy_grpc: {cluster_name: picker, authority: "localhost:9002"}}
                      processing_mode:
                        request_header_mode: SEND
                        response_header_mode: SEND
                        request_body_mode: FULL_DUPLEX_STREAMED
                        response_body_mode: FULL_DUPLEX_STREAMED
                        request_trailer_mode: SEND
                        response_trailer_mode: SEND
                  - &router
                    name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
                      suppress_envoy_headers: true
                route_config:
                  name: clients
                  virtual_hosts:
                    - name: sidecar
                      domains: ["*"]
                      routes: [{match: {prefix: /}, route: {cluster: sidecar, timeout: 0s, idle_timeout: 86400s}}]
    - name: decode
      address: {socket_address: {address: 127.0.0.1, port_value: {{ int .Values.sidecar.decodePort }}}}
      per_connection_buffer_limit_bytes: 32768
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: decode
                generate_request_id: false
                preserve_external_request_id: true
                server_header_transformation: PASS_THROUGH
                http_filters: [*router]
                route_config:
                  name: decode
                  virtual_hosts:
                    - name: picked
                      domains: ["*"]
                      routes: [{match: {prefix: /}, route: {cluster: picked, timeout: 0s, idle_timeout: 86400s}}]
  clusters:
    - name: sidecar
      type: STATIC
      connect_timeout: 5s
      circuit_breakers: &much {thresholds: [{max_connections: 40000, max_pending_requests: 40000, max_requests: 40000}]}
      load_assignment:
        cluster_name: sidecar
        endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{ int .Values.sidecar.port }}}}}}]}]
    - name: picked
      type: ORIGINAL_DST
      connect_timeout: 5s
      lb_policy: CLUSTER_PROVIDED
      original_dst_lb_config: {use_http_header: true, http_header_name: x-gateway-destination-endpoint}
      circuit_breakers: *much
    - name: picker
      type: STATIC
      connect_timeout: 5s
      circuit_breakers: *much
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: {http2_protocol_options: {}}
      load_assignment:
        cluster_name: picker
        endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 9002}}}}]}]
{{- end -}}
