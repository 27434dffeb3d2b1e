"""A survey's page: memory by category and through a step, time against cost, what is recommended. Opens offline.

It reads what `stoker plan --json` prints.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

_GIB = 2**30
_INK = "#1f2933"
_LIMIT = "#d9480f"
# Colour-blind safe (Okabe and Ito), what is always there first.
_COLOURS = {
    "weights": "#0072b2",
    "adapters": "#56b4e9",
    "gradients": "#009e73",
    "optimizer": "#7fc8a9",
    "activations": "#e69f00",
    "attention": "#d55e00",
    "logits": "#f0e442",
    "dequantisation": "#cc79a7",
    "transposed": "#a35683",
    "communication": "#882255",
    "context": "#999999",
    "fragmentation": "#cccccc",
}
_MARKS = {"full": "square", "lora": "circle", "nf4": "diamond", "int8": "triangle-up", "fp8": "star"}
_ROW_PIXELS = 26
# Candidates with a bar of their own: more cannot be told apart.
_BARS = 40


def render(survey: Mapping[str, Any]) -> str:
    """Returns the page of a survey as HTML, its library inline."""
    from jinja2 import Environment, select_autoescape

    template = resources.files("stoker.observe").joinpath("plan_page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=select_autoescape(default_for_string=True), trim_blocks=True)
    fitting = [offer for offer in survey["offers"] if offer["fits"] and offer["simplest"]]
    found = [offer for offer in survey["offers"] if not offer["fits"]]
    return environment.from_string(template).render(
        survey=survey,
        fitting=fitting,
        misfits=found,
        best=next((offer for offer in fitting if offer["name"] == survey["recommended"]), None),
        memory=_memory(_bars(fitting, survey["recommended"])) if fitting else "",
        timelines=[_timeline(one) for one in survey["timelines"]],
        cost=_time_and_cost(fitting, survey["recommended"]),
        gib=_GIB,
    )


def _bars(offers: Sequence[Mapping[str, Any]], recommended: str | None) -> Sequence[Mapping[str, Any]]:
    """The fastest, with the recommended one and those that none beats."""
    always = [offer for offer in offers if offer["pareto"] or offer["name"] == recommended]
    rest = [offer for offer in offers if offer not in always][: max(0, _BARS - len(always))]
    return [offer for offer in offers if offer in always or offer in rest]


def _timeline(one: Mapping[str, Any]) -> str:
    """The bytes of a candidate through a step, stacked by category, below what its device has."""
    import plotly.graph_objects as go

    moments = one["moments"]
    labels = [f"{moment['phase']}: {moment['label']}" for moment in moments]
    places = list(range(len(moments)))
    figure = go.Figure()
    for category, colour in _COLOURS.items():
        values = [moment["bytes"][category] / _GIB for moment in moments]
        if any(values):
            figure.add_scatter(
                x=places,
                y=values,
                name=category,
                mode="lines",
                stackgroup="held",
                line={"width": 0.5, "color": colour},
                fillcolor=colour,
                text=labels,
                hovertemplate="%{text}<br>" + category + " %{y:.2f} GiB<extra></extra>",
            )
    figure.add_scatter(
        x=places,
        y=[one["available_bytes"] / _GIB] * len(places),
        name="the device has",
        mode="lines",
        line={"color": _LIMIT, "width": 2, "dash": "dash"},
        hovertemplate="the device has %{y:.1f} GiB<extra></extra>",
    )
    of_phase: dict[str, list[int]] = {}
    for index, moment in enumerate(moments):
        of_phase.setdefault(moment["phase"], []).append(index)
    middles = [sum(indices) / len(indices) for indices in of_phase.values()]
    figure.update_layout(height=300, title={"text": one["name"], "font": {"size": 14}}, **_layout(top=40))
    figure.update_layout(showlegend=False)  # the colours are those of the chart above
    ends = [-0.5, len(moments) - 0.5]
    figure.update_xaxes(tickvals=middles, ticktext=list(of_phase), tickangle=0, range=ends, showgrid=False)
    figure.update_yaxes(title_text="GiB", rangemode="tozero")
    return figure.to_html(full_html=False, include_plotlyjs=False, config=_config())


def _memory(offers: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the bytes at the peak, stacked by category, beside what each device has."""
    import plotly.graph_objects as go

    names = [offer["name"] for offer in offers]
    figure = go.Figure()
    for category, colour in _COLOURS.items():
        values = [offer["memory_bytes"][category] / _GIB for offer in offers]
        if any(values):
            figure.add_bar(
                y=names,
                x=values,
                name=category,
                orientation="h",
                marker_color=colour,
                hovertemplate="%{y}<br>" + category + " %{x:.2f} GiB<extra></extra>",
            )
    figure.add_scatter(
        y=names,
        x=[offer["available_bytes"] / _GIB for offer in offers],
        name="the device has",
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 18, "color": _LIMIT, "line": {"width": 2}},
        hovertemplate="%{y}<br>has %{x:.1f} GiB<extra></extra>",
    )
    figure.update_layout(barmode="stack", height=150 + _ROW_PIXELS * len(offers), **_layout())
    figure.update_yaxes(range=[len(offers) - 0.4, -0.6], automargin=True)
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero")
    return figure.to_html(full_html=False, include_plotlyjs="inline", config=_config())


def _time_and_cost(offers: Sequence[Mapping[str, Any]], recommended: str | None) -> str:
    """Candidates by time and cost, with the line of those that none beats in both; nothing where no price is known."""
    import plotly.graph_objects as go

    priced = [offer for offer in offers if offer["usd_per_step"] is not None]
    if not priced:
        return ""
    whole_run = all(offer["hours"] is not None for offer in priced)

    def place(offer: Mapping[str, Any]) -> tuple[float, float]:
        # Where the run's length is not known, a thousand steps stand for it.
        if whole_run:
            return offer["hours"], offer["usd"]
        return offer["step_seconds"] / 3.6, 1000 * offer["usd_per_step"]

    figure = go.Figure()
    line = sorted(place(offer) for offer in priced if offer["pareto"])
    figure.add_scatter(
        x=[time for time, _ in line],
        y=[cost for _, cost in line],
        name="none is better in both",
        mode="lines",
        line={"color": "#d9480f", "width": 2, "shape": "hv"},
    )
    for method, mark in _MARKS.items():
        some = [offer for offer in priced if offer["method"] == method]
        if some:
            figure.add_scatter(
                x=[place(offer)[0] for offer in some],
                y=[place(offer)[1] for offer in some],
                name=method,
                mode="markers+text",
                text=[_short(offer) if offer["pareto"] else "" for offer in some],
                textposition="top center",
                customdata=[offer["name"] for offer in some],
                marker={"symbol": mark, "size": [16 if offer["name"] == recommended else 9 for offer in some]},
                hovertemplate="%{customdata}<br>%{x:.2f} h, $%{y:.2f}<extra></extra>",
            )
    of = "the run" if whole_run else "a thousand steps"
    figure.update_layout(height=480, **_layout())
    figure.update_xaxes(title_text=f"hours for {of}", type="log")
    figure.update_yaxes(title_text=f"US dollars for {of}", type="log")
    return figure.to_html(full_html=False, include_plotlyjs=False, config=_config())


def _short(offer: Mapping[str, Any]) -> str:
    count, key = offer["num_devices"], offer["device"]["key"]
    return key if count == 1 else f"{count} x {key}"


def _layout(top: int = 30) -> dict[str, Any]:
    # Colours of text and lines are the page's, which follows the reader's light or dark (plan_page.html).
    return {
        "template": "plotly_white",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 24, "t": top, "b": 50},
        "font": {"family": "system-ui, sans-serif", "color": _INK, "size": 13},
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "y": 1.0,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
        },
    }


def _config() -> dict[str, Any]:
    return {"displayModeBar": False, "responsive": True}
