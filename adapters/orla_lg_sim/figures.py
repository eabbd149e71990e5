"""The engine's load in Prometheus' text form, under the names that vLLM uses, with ``sim:`` before them."""

from __future__ import annotations

from orla_lg_sim.engine import SimEngine


def exposition(engine: SimEngine, started_s: float) -> str:
    """Return all figures; *started_s* tells one start of the server from another, in seconds since 1970."""
    state, parameters = engine.state(), engine.parameters
    gauges = {
        "num_requests_running": state.running,
        "num_requests_waiting": state.waiting,
        "kv_cache_usage_perc": state.kv_usage,
    }
    counters = {
        "prefix_cache_queries_total": state.prefix_queries,
        "prefix_cache_hits_total": state.prefix_hits,
        "num_preemptions_total": state.preemptions,
        "kv_cache_evictions_total": state.evictions,
        "request_success_total": state.finished,
        "steps_total": state.steps,
    }
    lines = [_sample(name, value, "gauge") for name, value in gauges.items()]
    lines += [_sample(name, value, "counter") for name, value in counters.items()]
    labels = f'block_size="{parameters.block_tokens}",num_gpu_blocks="{parameters.kv_blocks}"'
    lines.append(_sample("process_start_time_seconds", started_s, "gauge"))
    lines.append(f"# TYPE sim:cache_config_info gauge\nsim:cache_config_info{{{labels}}} 1\n")
    return "".join(lines)


def _sample(name: str, value: float, kind: str) -> str:
    return f"# TYPE sim:{name} {kind}\nsim:{name} {value}\n"
