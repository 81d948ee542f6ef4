// Accounts: who may look, label and administer. Only admins see this.

import { useEffect, useState } from "./vendor/hooks.js";
import { get, patch, post, remove } from "./api.js";
import { Empty, html, Problem, Waiting } from "./ui.js";

const ROLES = ["viewer", "annotator", "admin"];

export function View({ about }) {
  const [people, setPeople] = useState(null);
  const [shown, setShown] = useState(null);
  const [problem, setProblem] = useState(null);
  const read = () => get("/api/people").then(setPeople, setProblem);
  useEffect(() => { read(); }, []);
  const then = (asked) => asked.then((answer) => { setShown(answer?.token ? answer : null); setProblem(null); return read(); }, setProblem);
  const add = (event) => {
    event.preventDefault();
    const { name, role } = event.target.elements;
    then(post("/api/people", { name: name.value.trim(), role: role.value })).then(() => event.target.reset());
  };
  if (about.role !== "admin") return html`<${Empty} title="People">Only admins see accounts.<//>`;
  if (problem && !people) return html`<${Problem} error=${problem}/>`;
  if (!people) return html`<${Waiting}/>`;
  return html`<h1>People</h1>
    <form class="row" onSubmit=${add}>
      <label>Name <input name="name" required maxlength="64"/></label>
      <label>Role <select name="role">${ROLES.map((role) => html`<option selected=${role === "annotator"}>${role}</option>`)}</select></label>
      <button class="primary">Add</button>
    </form>
    ${problem && html`<${Problem} error=${problem}/>`}
    ${shown && html`<p class="panel" role="status">Give ${shown.name} this address. It is shown once.<br/>
      <code>${`${location.origin}/#token=${shown.token}`}</code></p>`}
    ${people.length === 0 ? html`<${Empty} title="Nobody else yet">Add somebody above.<//>` : html`<table>
      <thead><tr><th>Name</th><th>Role</th><th>Since</th><td></td></tr></thead>
      <tbody>${people.map((each) => html`<tr key=${each.name}>
        <td>${each.name}${!each.is_active && html` <span class="tag">revoked</span>`}</td>
        <td><select aria-label=${`Role of ${each.name}`} value=${each.role}
          onChange=${(event) => then(patch(`/api/people/${encodeURIComponent(each.name)}`, { role: event.target.value }))}>
          ${ROLES.map((role) => html`<option>${role}</option>`)}</select></td>
        <td class="faint">${each.created.slice(0, 10)}</td>
        <td class="row"><button onClick=${() => then(post(`/api/people/${encodeURIComponent(each.name)}/token`))}>New token</button>
          ${each.is_active && html`<button onClick=${() => then(remove(`/api/people/${encodeURIComponent(each.name)}`))}>Revoke</button>`}</td>
      </tr>`)}</tbody></table>`}`;
}
