/** Playground: a prompt, how tokens are drawn, and a column with the growing answer of each model that was chosen. */

const NUMBERS = [
  ['max_tokens', 'at most (tokens)', { min: '1', step: '1' }],
  ['temperature', 'temperature', { min: '0', step: '0.1' }],
  ['top_p', 'top p', { min: '0', max: '1', step: '0.05' }],
  ['seed', 'seed', { step: '1', placeholder: 'any' }]
];

class Asking {
  constructor(model, root) {
    this.model = model;
    this.ask = 0;
    this.columns = new Map();
    this.offered = [];
    this.choices = element('fieldset', { class: 'tuft-choices' });
    this.answers = element('div', { class: 'tuft-answers' });
    this.state = element('span', { class: 'tuft-note', role: 'status' });
    root.append(this.question(), this.choices, this.buttons(), this.answers);
    this.heard = message => message?.type === 'answer' && this.say(message);
    model.on('msg:custom', this.heard);
  }

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  question() {
    const prompt = element('textarea', {
      rows: '3',
      'aria-label': 'Prompt',
      placeholder: 'Ask something (Ctrl+Enter)',
      onchange: event => this.set('prompt', event.target.value),
      onkeydown: event => {
        event.stopPropagation();
        if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
          this.begin();
        }
      }
    });
    prompt.value = this.model.get('prompt');
    this.prompt = prompt;
    const numbers = NUMBERS.map(([name, label, limits]) => {
      const input = element('input', {
        type: 'number',
        ...limits,
        onkeydown: event => event.stopPropagation(),
        onchange: event =>
          this.set(
            name,
            event.target.value === '' ? null : Number(event.target.value)
          )
      });
      input.value = this.model.get(name) ?? '';
      return element('label', {}, `${label} `, input);
    });
    const chat = element('input', {
      type: 'checkbox',
      onchange: event => this.set('chat', event.target.checked)
    });
    chat.checked = this.model.get('chat');
    const controls = element(
      'div',
      { class: 'tuft-controls' },
      ...numbers,
      element('label', {}, chat, ' chat')
    );
    return element('div', {}, prompt, controls);
  }

  buttons() {
    const ask = element(
      'button',
      { type: 'button', class: 'tuft-button', onclick: () => this.begin() },
      'Ask'
    );
    this.stop = element(
      'button',
      {
        type: 'button',
        class: 'tuft-button',
        onclick: () => this.model.send({ type: 'stop' })
      },
      'Stop'
    );
    this.stop.disabled = true;
    return element(
      'div',
      { class: 'tuft-controls' },
      ask,
      this.stop,
      this.state
    );
  }

  /** What can be asked: base models first, then checkpoints, the newest first. */
  offer(offered) {
    const chosen = new Set(this.model.get('models'));
    const unlisted = [...chosen]
      .filter(name => !offered.some(each => each.name === name))
      .map(name => ({ name, label: shortName(name) }));
    this.offered = [...offered, ...unlisted];
    const boxes = this.offered.map(each => {
      const box = element('input', {
        type: 'checkbox',
        onchange: () => {
          const names = new Set(this.model.get('models'));
          box.checked ? names.add(each.name) : names.delete(each.name);
          this.set('models', [...names]);
        }
      });
      return element('label', { title: each.name }, box, ` ${each.label}`);
    });
    const fresh = element(
      'fieldset',
      { class: 'tuft-choices' },
      element('legend', {}, 'Who answers'),
      ...boxes
    );
    if (this.choices.childNodes.length === fresh.childNodes.length) {
      renew(this.choices, fresh);
    } else {
      this.choices.replaceChildren(...fresh.childNodes);
    }
    this.choices.querySelectorAll('input').forEach((box, i) => {
      box.checked = chosen.has(this.offered[i].name);
    });
  }

  begin() {
    const chosen = this.model.get('models');
    const models = this.offered.filter(each => chosen.includes(each.name));
    const prompt = this.prompt.value;
    if (!models.length || !prompt.trim()) {
      this.state.textContent = models.length
        ? 'Type a prompt first.'
        : 'Choose who answers first.';
      return;
    }
    this.set('prompt', prompt);
    this.ask += 1;
    this.columns = new Map(
      models.map(each => {
        const text = element('div', {
          class: 'tuft-answer',
          tabindex: '0',
          'aria-label': `Answer of ${each.label}`
        });
        return [each.name, { text, ended: false, label: each.label }];
      })
    );
    this.answers.replaceChildren(
      ...[...this.columns.values()].map(({ text, label }) =>
        element('section', {}, element('h4', {}, label), text)
      )
    );
    this.stop.disabled = false;
    this.state.textContent =
      'Waiting (a cell that runs in this kernel is finished first) …';
    this.model.send({
      type: 'ask',
      id: this.ask,
      models: models.map(each => each.name)
    });
  }

  say({ id, model, text, ended, problem }) {
    const column = id === this.ask && this.columns.get(model);
    if (!column) {
      return;
    }
    column.ended = ended;
    column.text.textContent = text;
    if (problem) {
      column.text.append(element('p', { class: 'tuft-problem' }, problem));
    }
    const left = [...this.columns.values()].filter(each => !each.ended).length;
    this.state.textContent = left ? `${left} still at it …` : 'Done.';
    this.stop.disabled = !left;
  }
}

function render({ model, el }) {
  const root = element('div', { class: 'tuft-widget' });
  el.append(root);
  const asking = new Asking(model, root);
  const end = follow(
    model,
    root,
    picture => picture.offered && asking.offer(picture.offered),
    () => null
  );
  return () => {
    end();
    model.off('msg:custom', asking.heard);
  };
}

export default { render };
