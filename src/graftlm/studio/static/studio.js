// The glue between htmx, server-sent events and uPlot; everything else is the server's.
"use strict";
(() => {
  const charts = new Map();
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colours = ["--accent", "--second", "--note", "--wrong", "--dim", "--ink"];

  // data: {step: […], <any name>: […]}; a series for each name but step
  function draw(element, data) {
    const names = Object.keys(data).filter((name) => name !== "step");
    const rows = [data.step, ...names.map((name) => data[name])];
    const chart = charts.get(element);
    if (chart && chart.series.length === rows.length) { chart.setData(rows); return; }
    if (chart) chart.destroy();
    if (!data.step.length) return;
    const labels = element.dataset.labels ? JSON.parse(element.dataset.labels) : names;
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const series = names.map((name, i) => ({
      label: labels[i], stroke: colour(colours[i % colours.length]), width: 2, spanGaps: true,
      dash: i >= colours.length ? [6, 4] : undefined, points: { show: data.step.length < 40 || name === "held_out" },
      value: (_, v) => (v == null ? "–" : v.toPrecision(4)),
    }));
    charts.set(element, new uPlot({
      width: element.clientWidth - 16, height: 240, series: [{ label: element.dataset.x }, ...series],
      axes: [axis, axis], scales: { x: { time: false } }, cursor: { y: false },
    }, rows, element));
  }

  function begin(root) {
    for (const element of root.querySelectorAll("[data-curve]")) draw(element, JSON.parse(element.dataset.curve));
    for (const log of root.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
  }

  const told = document.getElementById("told");
  const tell = (text) => { told.textContent = text; };
  const on = (name, action) => document.body.addEventListener(name, action);

  document.addEventListener("DOMContentLoaded", () => begin(document));
  window.addEventListener("resize", () => charts.forEach((chart, e) => chart.setSize({ width: e.clientWidth - 16, height: 240 })));
  on("htmx:sseBeforeMessage", (event) => {
    const element = event.detail.elt || event.target;
    if ("curve" in (element.dataset || {})) { event.preventDefault(); draw(element, JSON.parse(event.detail.data)); }
  });
  on("htmx:sseMessage", (event) => { if (event.target.classList.contains("log")) event.target.scrollTop = event.target.scrollHeight; });
  on("htmx:afterSwap", (event) => {  // a text that is typed into keeps its place and its history
    const sent = event.detail.requestConfig?.parameters ?? {};
    for (const text of document.querySelectorAll("[data-sets]")) {
      const field = document.getElementById(text.dataset.sets);
      if (sent[field.name] === undefined || sent[field.name] === field.value) field.value = text.textContent;  // else it was typed into since
      text.remove();
    }
  });
  on("htmx:afterSettle", (event) => {
    begin(event.target);
    const keys = new Set([...document.querySelectorAll("#problems [data-key]")].map((item) => item.dataset.key));
    for (const input of document.querySelectorAll("#form [name]")) {
      if (keys.has(input.name)) input.setAttribute("aria-invalid", "true"); else input.removeAttribute("aria-invalid");
    }
  });
  on("htmx:responseError", (event) => tell(event.detail.xhr.responseText.trim() || `${event.detail.xhr.status}`));
  const silent = () => tell(told.dataset.silent);
  on("htmx:sendError", silent);
  on("htmx:sseError", silent);
  on("htmx:sseOpen", () => tell(""));
  on("htmx:beforeRequest", (event) => { if (event.detail.requestConfig.triggeringEvent) tell(""); });  // a list's own looks say nothing
  on("htmx:afterRequest", (event) => { if (event.detail.successful && told.textContent === told.dataset.silent) tell(""); });

  let typed = null;  // the form or the recipe, until what was typed is sent: what is pressed then waits for that
  on("input", (event) => { typed = event.target.closest("#form, #yaml") ?? typed; });
  on("htmx:beforeRequest", (event) => { if (event.detail.elt === typed) typed = null; });
  document.addEventListener("click", (event) => { if (event.target.closest("[hx-sync='#form:queue']")) typed?.dispatchEvent(new Event("flush")); }, true);
})();
