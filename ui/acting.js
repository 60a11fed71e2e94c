// Runs inside one gr.HTML (js_on_load): a click on anything with data-act becomes the Python event "act", or "ask" where
// it makes the assistant answer (data-act "ask", "retry" or "shorter").
// Everything else that data-* carries goes along, which conversation and comparison the page shows, and when it was. data-confirm asks first. Text being selected is not a click.
element.addEventListener("click", (event) => {
  const target = event.target.closest("[data-act]");
  if (!target || !element.contains(target)) return;
  if (event.target.closest("a[href]")) return;
  if (target.dataset.card !== undefined && String(window.getSelection())) return;
  event.stopPropagation();
  if (target.dataset.confirm && !window.confirm(target.dataset.confirm)) return;
  const asks = ["ask", "retry", "shorter"].includes(target.dataset.act);
  const { conversation, comparison } = element.querySelector("section.exchange")?.dataset || {};
  trigger(asks ? "ask" : "act", { conversation, comparison, at: performance.timeOrigin + performance.now(), ...target.dataset });
});
