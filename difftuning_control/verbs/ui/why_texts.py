"""What the figures of the page mean, a sentence each, in the languages of the reports."""

from __future__ import annotations

LANGUAGES = {"English": "en", "日本語": "ja"}
TEXTS = {
    "en": {
        "chain": "Chain of forgetting",
        "chain.about": (
            "The loss by noise level u, from nearly clean pictures (0) to pure noise (1), of the pretrained model "
            "(dashed) and of the tuned one: lower on your pictures is what it learnt, higher on the knowledge bank is "
            "what it forgot."
        ),
        "target": "your pictures",
        "bank": "knowledge bank",
        "learnt": "Learnt: the loss on your held-out pictures changed by {change}.",
        "forgot": "Forgotten: the loss on the model's own samples changed by {change}.",
        "schedule": "Schedule",
        "schedule.about": (
            "How strongly each noise level counts: reconsolidation ψ for your pictures rises with the noise, where the "
            "new look must be learnt; retention ξ for the knowledge bank falls, since what is known about nearly clean "
            "pictures carries over."
        ),
        "budget": "Forgetting budget",
        "budget.about": "How much the loss on the bank was allowed to rise in each band of noise, and how much it did.",
        "kept": "kept",
        "exceeded": "exceeded",
        "reports": "Analyses and pilots",
        "reports.about": "What difftune analyze and difftune pilot found in this folder.",
        "none": "Choose a finished run to see why it came out as it did.",
        "no_reports": "There are none yet: difftune pilot PICTURES compares plain fine-tuning with Diff-Tuning on your "
        "data.",
        "u": "noise level u",
    },
    "ja": {
        "chain": "忘却の連鎖",
        "chain.about": (
            "ノイズレベルu(0はほぼきれいな画像、1は純粋なノイズ)ごとの損失です。破線は事前学習モデル、実線は調整後のモデルです。"
            "手元の画像での低下が学んだこと、知識バンクでの上昇が忘れたことを表します。"
        ),
        "target": "手元の画像",
        "bank": "知識バンク",
        "learnt": "学習: 取り分けた手元の画像での損失の変化は{change}です。",
        "forgot": "忘却: モデル自身のサンプルでの損失の変化は{change}です。",
        "schedule": "スケジュール",
        "schedule.about": (
            "各ノイズレベルの重みです。手元の画像の再固定化ψはノイズとともに大きくなり(新しい見た目を学ぶ所)、"
            "知識バンクの保持ξは小さくなります(ほぼきれいな画像についての知識はそのまま引き継がれるため)。"
        ),
        "budget": "忘却予算",
        "budget.about": "ノイズ帯ごとに、知識バンクでの損失の上昇として許された値と、実際の値です。",
        "kept": "範囲内",
        "exceeded": "超過",
        "reports": "分析とパイロット",
        "reports.about": "このフォルダーでdifftune analyzeとdifftune pilotが得た結果です。",
        "none": "完了した実行を選ぶと、結果の理由を表示します。",
        "no_reports": "まだありません。difftune pilot 画像フォルダー で、通常の微調整とDiff-Tuningを"
        "手元のデータで比較できます。",
        "u": "ノイズレベルu",
    },
}
