"""The values with which the charts are rendered, by what they stand for."""

OPERATORS = [
    part
    for kind in ("PodMonitor", "ServiceMonitor", "PrometheusRule")
    for part in ("-a", f"monitoring.coreos.com/v1/{kind}")
]
_SCALED = (
    '={"kind":"hpa","metrics":[{"type":"Resource","resource":{"name":"cpu","target":{"type":"Utilization",'
    '"averageUtilization":60}}}],"behavior":{"scaleDown":{"stabilizationWindowSeconds":600}}}'
)
_TRIGGERED = (
    '={"kind":"keda","triggers":[{"type":"prometheus","metadata":{"serverAddress":"http://p:9090","query":"up",'
    '"threshold":"4"}}],"behavior":{"scaleDown":{"stabilizationWindowSeconds":600}}}'
)
_LLAMA = ("-f", "values/llama31-8b.yaml")
_SERVED = ("--set", "engines.release=ms-llama31")

VARIANTS: dict[str, tuple[str, ...]] = {
    "engines": ("pd-engines", *_LLAMA),
    "engines, small": ("pd-engines", "-f", "values/small.yaml", "-f", "values/none.yaml"),
    "engines on InfiniBand": ("pd-engines", *_LLAMA, "-f", "values/infiniband.yaml"),
    "engines on RoCE": ("pd-engines", *_LLAMA, "-f", "values/roce.yaml"),
    "engines on EFA": ("pd-engines", *_LLAMA, "-f", "values/efa.yaml"),
    "engines with a download": ("pd-engines", *_LLAMA, "--set", "cache.mode=download,cache.storageClassName=nfs"),
    "engines with a shared cache": ("pd-engines", *_LLAMA, "--set", "cache.mode=pvc,cache.keep=true"),
    "engines with monitors": ("pd-engines", *_LLAMA, *OPERATORS),
    "engines that are scaled": (
        "pd-engines", *_LLAMA,
        "--set-json", f"prefill.autoscaling{_SCALED}", "--set-json", f"decode.autoscaling{_TRIGGERED}",
    ),
    "engines with several names": (
        "pd-engines", *_LLAMA, "--set", "model.servedNames={llama,llama-8b},model.revision=abc,args={--seed=1}",
    ),
    "router": ("pd-router", *_SERVED),
    "router with monitors": ("pd-router", *_SERVED, *OPERATORS, "--set", "replicas=2"),
    "router by pods": ("pd-router", *_SERVED, "--set", "monitoring.scrape=podMonitor"),
    "router that is scaled": ("pd-router", *_SERVED, "--set-json", f"autoscaling{_SCALED}"),
    "router that KEDA scales": ("pd-router", *_SERVED, "--set-json", f"autoscaling{_TRIGGERED}"),
    "router with key and TLS": ("pd-router", *_SERVED, "--set", "apiKey.existingSecret=k,tls.existingSecret=t"),
    "router of fixed engines": (
        "pd-router", "--set", "engines.prefill.urls={http://a:8000},engines.decode.dns=decode:8200",
    ),
    "router that another release stands in for": ("pd-router", *_SERVED, "--set", "service.release=llm-d-router"),
    "llm-d": ("llm-d-router", *_SERVED),
    "llm-d by its sample": ("llm-d-router", *_SERVED, "--set", "epp.preset=pd-sample"),
    "vllm-router": (
        "vllm-router", *_SERVED, "--set", "engines.prefill={http://a:8000},engines.decode={http://b:8200}",
    ),
    "router of another namespace": (
        "pd-router", *_SERVED, "--set", "engines.namespace=models,config.policy=pd_cost,config.workers=4",
    ),
}  # fmt: skip
