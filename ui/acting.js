// Runs inside one gr.HTML (js_on_load): a click on anything with data-act becomes the Python event "act", or "ask" where
// it makes the assistant answer (data-act "ask", "retry" or "shorter"), or "older" where it lists more conversations.
// Everything else that data-* carries goes along, which conversation and comparison the page shows, and when it was. data-confirm asks first. Text being selected is not a click.
element.addEventListener("click", (click) => {
  const target = click.target.closest("[data-act]");
  if (!target || !element.contains(target)) return;
  if (click.target.closest("a[href]")) return;
  if (target.dataset.card !== undefined && String(window.getSelection())) return;
  click.stopPropagation();
  if (target.dataset.confirm && !window.confirm(target.dataset.confirm)) return;
  const { act } = target.dataset;
  const event = ["ask", "retry", "shorter"].includes(act) ? "ask" : act === "older" ? act : "act";
  const { conversation, comparison } = element.querySelector("section.exchange")?.dataset || {};
  trigger(event, { conversation, comparison, at: performance.timeOrigin + performance.now(), ...target.dataset });
});
